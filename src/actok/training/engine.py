"""The training of every learned tokenizer: its codec, its codebooks, the objectives it is aligned by."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actok.quantizers import Quantizer
from actok.quantizers.codebook import Codebook
from actok.tokenizers.neural import join
from actok.training.checkpoint import Checkpoint
from actok.training.config import TrainConfig
from actok.training.loop import Loop
from actok.training.model import Aligned, pinned
from actok.training.report import CodeUse, shares
from actok.training.run_folder import RunFolder
from actok.training.sources import Batches, Source, TrainBatch

if TYPE_CHECKING:
    from actok.alignment.objectives import SemanticHeads
    from actok.tokenizers.neural import NeuralTokenizer

# Codebooks that start late do so from so many batches, and of about so many chunks at most.
START_BATCHES, START_CHUNKS = 16, 8192

__all__ = ["Trained", "Trainer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """What a run gives.

    Attributes:
        tokenizer: with the weights of the best evaluation, or the last ones where nothing was evaluated.
        summary: JSON values for the artifact's meta.
    """

    tokenizer: NeuralTokenizer
    summary: Mapping[str, Any]


class Trainer(Loop):
    """One training run of one tokenizer.

    Args:
        tokenizer: untrained.
        sources: at least one dataset.
        config: how to train.
        ratios: of the sources; "size": every chunk is as likely as any other.
        judge: metrics of a tokenizer on validation episodes, of which "l1" chooses the best; None: keep the last weights.
        folder: where log and checkpoints go; None: nowhere.
        heads: semantic objectives (`actok.alignment`) that are trained along and dropped afterwards; None: none.
        masking_from: share of the steps after which masked action modelling begins.
        progress: show a bar on stderr.
    """

    def __init__(
        self,
        tokenizer: NeuralTokenizer,
        sources: Sequence[Source],
        config: TrainConfig,
        *,
        ratios: Sequence[float] | Literal["size"] = "size",
        judge: Callable[[NeuralTokenizer], dict[str, Any]] | None = None,
        folder: RunFolder | None = None,
        heads: SemanticHeads | None = None,
        masking_from: float = 0.0,
        progress: bool = True,
    ) -> None:
        super().__init__(config, [s.size for s in sources], ratios=ratios, folder=folder)
        self.tokenizer, self.judge, self.heads = tokenizer, judge, heads
        self.masking_from = max(config.unquantised, round(masking_from * config.steps))
        self.batches = Batches(tokenizer, sources, self.sampler, rank=self.rank, ranks=self.ranks)
        self.codec = copy.deepcopy(tokenizer.codec).train().requires_grad_(True)
        if config.compile:
            self.codec.compile()
        self.quantizers = [m for m in self.codec.modules() if isinstance(m, Quantizer)]
        self.codebooks = [m for m in self.codec.modules() if isinstance(m, Codebook)]
        self._prepare(
            Aligned(self.codec, heads),
            {name: p for name, p in self.codec.named_parameters() if p.requires_grad},
            title=f"training {tokenizer.kind}",
            levels=self.codec.quantizer.sizes,
            patience=max(config.warmup, 2 * config.unquantised),
            progress=progress,
        )
        self.best: dict[str, Any] | None = None
        self.best_state: dict[str, Tensor] | None = None

    def run(self) -> Trained:
        """Train from where the run stands to its last step.

        Raises TrainingError where it cannot go on, TrainingStopped where SIGTERM or Ctrl-C ended it after a whole step.
        """
        self._run()
        return Trained(tokenizer=self.tokenizer.with_weights(self.best_state or self._state()), summary=self._summary())

    # -- a step ---------------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> TrainBatch:
        return self.batches.at(step)

    def _pinned(self, batch: TrainBatch) -> TrainBatch:
        return pinned(batch)

    def _begin(self, step: int) -> None:
        if self.config.unquantised:
            for quantizer in self.quantizers:
                quantizer.bypassed = step < self.config.unquantised
            if step == self.config.unquantised:
                self._start_codebooks(step)
        self._anneal(step)
        if self.heads is not None:
            self.heads.masking_on = step >= self.masking_from

    def _forward(self, batch: TrainBatch) -> tuple[Mapping[str, Tensor], CodeUse | None]:
        output = self.model(batch)
        drawn = output.codes.shape[0] * output.codes.shape[1]
        return output.losses, None if output.usage is None else CodeUse(usage=output.usage, drawn=drawn)

    def _anneal(self, step: int) -> None:
        """Give the codebooks the pace of a step, where they slow down at all."""
        if self.config.anneal_codebooks and step >= self.config.warmup:
            for codebook in self.codebooks:
                codebook.pace.fill_(self.config.learning_rate_at(step) / self.config.learning_rate)

    @torch.no_grad()
    def _start_codebooks(self, step: int) -> None:
        """Codebooks from the latents of this batch and some that follow: a batch alone has fewer than there are codes."""
        count = max(1, min(START_BATCHES, START_CHUNKS // self.config.batch_size))
        pool = join([self.batches.at(step + i, steps=self.tokenizer.horizon).chunks for i in range(count)])
        self.codec.forward(pool.to(self.accelerator.device))  # called, it would be compiled for this size too
        for codebook in self.codebooks:
            codebook.weigh(1 / count)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        return self.judge is not None and self.done > self.config.unquantised

    def _judge(self) -> None:
        """Evaluate the weights to be kept, on the first process; all learn whether they are the best so far."""
        before = time.perf_counter()
        state = self._state()
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            assert self.judge is not None
            tokenizer = self.tokenizer.with_weights(state).to(self.accelerator.device)
            found = [{"step": self.done, **self.judge(tokenizer)}]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(found)
        metrics = found[0]
        if self.best is None or metrics["l1"] < self.best["l1"]:
            self.best, self.best_state = metrics, {name: value.cpu().clone() for name, value in state.items()}
        rates = ", ".join(f"{rate:.1%} within {tolerance}" for tolerance, rate in metrics["vrr"].items())
        self.report.validation(
            metrics,
            time.perf_counter() - before,
            told=f"l1 {metrics['l1']:.4f}, {rates}, codes used {shares(metrics['codes_used'])}",
            shown={"val_l1": f"{metrics['l1']:.4f}", "vrr": shares(metrics["vrr"].values())},
        )

    # -- state ----------------------------------------------------------------------------------------------------

    def _trained(self) -> dict[str, nn.Parameter]:
        """All parameters of the optimiser by name, the heads' with a prefix of their own."""
        heads = {} if self.heads is None else {f"heads.{n}": p for n, p in self.heads.named_parameters()}
        return {**self.names, **heads}

    def _state(self) -> dict[str, Tensor]:
        """The weights to evaluate and keep: averaged where they are, codebooks as they stand."""
        return {**self.codec.state_dict(), **self.ema}

    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        return {
            "model": self.codec.state_dict(),
            "heads": {} if self.heads is None else self.heads.state_dict(),
            "best": self.best_state or {},
        }

    def _facts(self) -> dict[str, Any]:
        return {"best": self.best}

    def _put_back(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors
        self.codec.load_state_dict(tensors["model"])
        if self.heads is not None:
            self.heads.load_state_dict(tensors["heads"])
        self.best, self.best_state = checkpoint.facts["best"], dict(tensors["best"]) or None
        self._anneal(checkpoint.step - 1)  # the pace is in no file, and codebooks that start now do so at the last one

    def _summary(self) -> dict[str, Any]:
        return {**super()._summary(), "validation": self.best}
