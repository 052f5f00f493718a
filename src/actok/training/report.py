"""What a training run tells while it goes: lines of the log, trackers, the progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from actok.training.config import TrainConfig
from actok.training.health import Health
from actok.training.run_folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["CodeUse", "Report", "flat", "shares"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CodeUse:
    """How a step used a quantiser's codes.

    Attributes:
        usage: `share` and `perplexity` of each level.
        drawn: codes that each level drew in the step.
    """

    usage: Any
    drawn: int


class Report:
    """Gathers the losses of steps on the device, reads them a window at a time, and tells.

    Args:
        accelerator: of the run; only its first process tells.
        config: of the run.
        folder: for log.jsonl, or None.
        health: judges what is read.
        name: shown on the bar.
        progress: show the bar, and a line after each evaluation, on stderr.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        folder: RunFolder | None,
        health: Health,
        *,
        name: str,
        progress: bool,
    ) -> None:
        self.accelerator, self.config, self.folder, self.health = accelerator, config, folder, health
        self.name, self.progress = name, progress
        self._window: list[tuple[dict[str, Tensor], Tensor | None]] = []
        self._use: CodeUse | None = None
        self._last: dict[str, Any] = {}
        self._shown: dict[str, str] = {}
        self._since = self._waited = 0.0

    def open(self, done: int) -> Self:
        """Begin, `done` steps into the run. To be used as a context."""
        self._bar = tqdm(
            total=self.config.steps, initial=done, desc=self.name, unit="step", disable=None if self.progress else True
        )
        self._since, self._waited = time.perf_counter(), 0.0
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def step(self, losses: Mapping[str, Tensor], norm: Tensor | None, use: CodeUse | None) -> None:
        """Note a step's losses, gradient norm and code use; nothing is read from the device."""
        self._window.append(({name: value.detach() for name, value in losses.items()}, norm))
        self._use = use
        self._bar.update()

    def read(self, done: int, waited: float) -> None:
        """Read the window that ends with step `done`, judge it and tell; `waited` is the time spent on data so far.

        All processes call it after the same step, and see the mean of their losses, so that all stop on the same figure.
        """
        if not self._window:
            return
        stacked = torch.stack([value.float() for losses, _ in self._window for value in losses.values()])
        values = self.accelerator.reduce(stacked, "mean").tolist()
        window, at = [], 0
        for losses, _ in self._window:
            window.append(dict(zip(losses, values[at : at + len(losses)], strict=True)))
            at += len(losses)
        self.health.losses(done - len(window) + 1, window)
        names = dict.fromkeys(name for losses in window for name in losses)
        mean = {name: sum(losses.get(name, 0.0) for losses in window) / len(window) for name in names}
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        line: dict[str, Any] = {
            "step": done,
            "loss": sum(mean.values()),
            "losses": mean,
            "learning_rate": self.config.learning_rate_at(done - 1),
            "steps_per_s": len(window) / elapsed,
            "chunks_per_s": len(window) * self.config.batch_size / elapsed,
            "waiting": (waited - self._waited) / elapsed,
        }
        if (norm := self._window[-1][1]) is not None:
            line["gradient_norm"] = float(norm)
        if self._use is not None:
            line["codes_used"] = self._use.usage.share.tolist()
            line["perplexity"] = self._use.usage.perplexity.tolist()
            self.health.codes(done, line["codes_used"], line["perplexity"], self._use.drawn)
        self._window = []
        self._since, self._waited = now, waited
        self._tell(line)

    @property
    def last_losses(self) -> dict[str, float]:
        """Mean losses by name of the last window that was read; none where none was."""
        return dict(self._last.get("losses", {}))

    def validation(self, metrics: Mapping[str, Any], seconds: float, *, told: str, shown: Mapping[str, str]) -> None:
        """Tell what an evaluation found, which took so long: in words, and by the names on the bar."""
        self._since += seconds
        self._shown = dict(shown)
        self._tell({"step": metrics["step"], "validation": metrics})
        if self.progress:
            tqdm.write(
                f"step {metrics['step']:,} of {self.config.steps:,}: loss {self._last['loss']:.4f}; validation {told};"
                f" {self._last['steps_per_s']:.1f} steps/s",
                sys.stderr,
            )

    def _tell(self, line: Mapping[str, Any]) -> None:
        self._last |= line
        if self.accelerator.is_main_process:
            if self.folder is not None:
                self.folder.log(line)
            if self.config.track:
                self.accelerator.log(flat(line), step=line["step"])
        shown = {"loss": f"{self._last['loss']:.4f}"}
        if "codes_used" in self._last:
            shown["codes"] = shares(self._last["codes_used"])
        self._bar.set_postfix(shown | self._shown, refresh=False)


def flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested mappings and lists under names such as "validation/vrr/0.03"."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, (list, tuple)):
            value = {str(i): v for i, v in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            found[f"{prefix}{name}"] = float(value)
    return found


def shares(values: Any) -> str:
    """Shares as "97% 100%"."""
    return " ".join(f"{v:.0%}" for v in values)
