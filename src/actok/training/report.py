"""What a training run tells while it goes: lines of the log, trackers, the progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from actok.training.config import TrainConfig
from actok.training.health import Health
from actok.training.run_folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Report", "flat"]


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
        self._output: Any = None
        self._last: dict[str, Any] = {}
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

    def step(self, output: Any, norm: Tensor | None) -> None:
        """Note a step's CodecOutput and gradient norm; nothing is read from the device."""
        self._window.append(({name: value.detach() for name, value in output.losses.items()}, norm))
        self._output = (output.usage, output.codes.shape[0] * output.codes.shape[1])
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
        usage, drawn = self._output
        if usage is not None:
            line["codes_used"] = usage.share.tolist()
            line["perplexity"] = usage.perplexity.tolist()
            self.health.codes(done, line["codes_used"], line["perplexity"], drawn)
        self._window = []
        self._since, self._waited = now, waited
        self._tell(line)

    def validation(self, metrics: Mapping[str, Any], seconds: float) -> None:
        """Tell what an evaluation found, which took so long."""
        self._since += seconds
        self._tell({"step": metrics["step"], "validation": metrics})
        if self.progress:
            rates = ", ".join(f"{rate:.1%} within {tolerance}" for tolerance, rate in metrics["vrr"].items())
            tqdm.write(
                f"step {metrics['step']:,} of {self.config.steps:,}: loss {self._last['loss']:.4f}; validation l1"
                f" {metrics['l1']:.4f}, {rates}, codes used {_shares(metrics['codes_used'])};"
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
            shown["codes"] = _shares(self._last["codes_used"])
        if "validation" in self._last:
            shown["val_l1"] = f"{self._last['validation']['l1']:.4f}"
            shown["vrr"] = _shares(self._last["validation"]["vrr"].values())
        self._bar.set_postfix(shown, refresh=False)


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


def _shares(values: Any) -> str:
    return " ".join(f"{v:.0%}" for v in values)
