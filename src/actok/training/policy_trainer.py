"""The training of a policy: imitation of chunks, on the loop that tokenizers are trained by."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actok.core import ConfigError
from actok.policies.base import Policy, PolicyBatch
from actok.training.checkpoint import Checkpoint
from actok.training.loop import Loop
from actok.training.policy_data import PolicyData, PolicySamples
from actok.training.policy_stages import PolicyTrainConfig, trained_names
from actok.training.report import CodeUse
from actok.training.run_folder import RunFolder

# Of the draws of an evaluation (noise of a flow), the same every time, so that losses can be compared.
EVALUATION_SEED = 0

__all__ = ["PolicyTrainer", "evaluate"]


class PolicyTrainer(Loop):
    """One training run of one policy, which is trained in place.

    Validation losses are told and not chosen by: the last weights are kept, since the loss of an imitated action says little
    about the success of a policy (docs/policies/training.md).

    With `accumulate` a step's gradient is that of the whole batch up to rounding, each loss being weighted by the terms that
    it is the mean of (`Policy.terms`), and so are the losses told. What is drawn on the way (positions, noise, dropout) is
    drawn part by part, so it is not what the batch in one piece would draw.

    Args:
        policy: to train.
        data: training samples, and those of the validation episodes.
        config: how to train.
        folder: where log and checkpoints go; None: nowhere.
        progress: show a bar on stderr.

    Raises ConfigError where a process's share of a batch cannot be taken in `accumulate` parts.
    """

    config: PolicyTrainConfig
    smaller = "take it in more parts (--train accumulate=2, 4, ...), or make batch_size smaller (--batch-size)"

    def __init__(
        self,
        policy: Policy,
        data: PolicyData,
        config: PolicyTrainConfig,
        *,
        folder: RunFolder | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(config, [len(data)], folder=folder)
        share = config.batch_size // self.ranks
        if share % config.accumulate:
            raise ConfigError(
                f"each of {self.ranks} processes has {share} of a batch's {config.batch_size} samples, which cannot be taken in"
                f" {config.accumulate} parts of one size; change accumulate or batch_size"
            )
        self.part = share // config.accumulate
        self.policy, self.data = policy.train(), data
        self.stages = trained_names(policy, config.stages)
        ever = frozenset().union(*self.stages)
        self.known = dict(policy.named_parameters())
        self.able = {name for name, parameter in self.known.items() if parameter.requires_grad}
        for name, parameter in self.known.items():
            parameter.requires_grad_(name in ever)
        self._prepare(
            policy,
            {name: p for name, p in self.known.items() if name in ever},
            title="training policy",
            progress=progress,
        )
        self.stage = -1
        self.found: dict[str, Any] | None = None
        self.losses: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Train from where the run stands to its last step, and leave the policy with the weights to keep.

        Returns JSON values on the run. Raises TrainingError where it cannot go on, TrainingStopped where SIGTERM or Ctrl-C
        ended it after a whole step.
        """
        self._run()
        with torch.no_grad():
            for name, value in self.ema.items():
                self.names[name].copy_(value)
        for name, parameter in self.known.items():
            parameter.requires_grad_(name in self.able)
        self.policy.eval()
        return self._summary()

    # -- a step ---------------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> PolicyBatch:
        return self.data.batch(self.sampler.samples(step, rank=self.rank, ranks=self.ranks).indices)

    def _pinned(self, batch: PolicyBatch) -> PolicyBatch:
        return replace(
            batch, actions=batch.actions.pin_memory(), real=batch.real.pin_memory(), codes=batch.codes.pin_memory()
        )

    def _begin(self, step: int) -> None:
        stage = self.config.stage_at(step)
        if stage != self.stage:
            self.stage = stage
            for name, parameter in self.names.items():
                parameter.requires_grad_(name in self.stages[stage])

    def _forward(self, batch: PolicyBatch) -> tuple[Mapping[str, Tensor], CodeUse | None]:
        return self.model(batch), None

    def _gradients(self, batch: PolicyBatch) -> tuple[Mapping[str, Tensor], CodeUse | None]:
        if self.config.accumulate == 1:
            return super()._gradients(batch)
        parts = [_rows(batch, slice(first, first + self.part)) for first in range(0, len(batch), self.part)]
        terms = [self.policy.terms(part) for part in parts]
        found: dict[str, Tensor] = {}
        for number, (part, own) in enumerate(zip(parts, terms, strict=True), 1):
            # Several processes average their gradients once, in the last part's backward pass.
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(self.model):
                losses, _ = self._losses(part)
                shares = {}
                for name, value in losses.items():
                    total = sum(other.get(name, self.part) for other in terms)
                    shares[name] = value * (own.get(name, self.part) / total)
                self._backward(shares)
            for name, value in shares.items():
                found[name] = value.detach() + found.get(name, 0.0)
        return found, None

    # -- evaluation -----------------------------------------------------------------------------------------------

    def _due(self) -> bool:
        return self.data.validation is not None

    def _judge(self) -> None:
        """Mean losses on the validation samples, of the weights that would be kept, on the first process."""
        before = time.perf_counter()
        assert self.data.validation is not None
        self.found = {"step": self.done}
        if self.accelerator.is_main_process:
            with self._averaged():
                self.found |= evaluate(
                    self.policy,
                    self.data.validation,
                    most=self.config.eval_chunks,
                    batch_size=self.part,
                    bf16=self.config.precision == "bf16",
                )
        self.accelerator.wait_for_everyone()
        found = self.found
        numbers = {**found.get("losses", {}), **found.get("report", {})}
        self.report.validation(
            found,
            time.perf_counter() - before,
            told=", ".join(f"{name} {value:.4f}" for name, value in numbers.items()),
            shown={f"val_{name}": f"{value:.4f}" for name, value in found.get("losses", {}).items()},
        )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within this context the policy has the weights of the moving average, where there is one."""
        held = {name: self.names[name].detach().clone() for name in self.ema}
        with torch.no_grad():
            for name, value in self.ema.items():
                self.names[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in held.items():
                    self.names[name].copy_(value)

    # -- state ----------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        # What no stage trains is as it was made or loaded, and in no checkpoint.
        frozen = self.known.keys() - self.names.keys()
        return {"model": {k: v for k, v in self.policy.state_dict().items() if k not in frozen}}

    def _facts(self) -> dict[str, Any]:
        return {"validation": self.found, "losses": self.report.last_losses}

    def _put_back(self, checkpoint: Checkpoint) -> None:
        self.policy.load_state_dict(dict(checkpoint.tensors["model"]), strict=False)
        self.found, self.losses = checkpoint.facts["validation"], checkpoint.facts["losses"]

    def _summary(self) -> dict[str, Any]:
        losses = self.report.last_losses or self.losses  # none were read where a finished run was resumed
        return {**super()._summary(), "losses": losses, "validation": self.found, "starts": list(self.config.starts)}


@torch.no_grad()
def evaluate(
    policy: Policy, samples: PolicySamples, *, most: int, batch_size: int, bf16: bool = False
) -> dict[str, Any]:
    """Mean losses of a policy on at most so many samples, an even sample, and what its heads report of themselves.

    Returns JSON values: "samples", "losses" by name (each the mean of its terms, see `Policy.terms`), "report" by name (mean
    over batches, weighted by their samples, of those in which the figure exists). Draws are the same every time, and torch's generators stand afterwards as before.
    """
    device = next(policy.parameters()).device
    rows = np.unique(np.linspace(0, len(samples) - 1, most).round().astype(np.int64))
    sums: dict[str, dict[str, list[float]]] = {"losses": {}, "report": {}}
    was = policy.training
    policy.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(EVALUATION_SEED)
            for first in range(0, len(rows), batch_size):
                chosen = rows[first : first + batch_size]
                batch = samples.batch(chosen)
                terms = policy.terms(batch)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    losses = policy.losses(batch.to(device))
                for key, found in (("losses", losses), ("report", policy.report())):
                    for name, value in found.items():
                        if key == "losses" or math.isfinite(float(value)):  # a level may have no code in a batch
                            total = sums[key].setdefault(name, [0.0, 0.0])
                            weight = terms.get(name, len(chosen)) if key == "losses" else len(chosen)
                            total[0] += float(value) * weight
                            total[1] += weight
    finally:
        policy.train(was)
    means = {key: {name: total / count for name, (total, count) in found.items()} for key, found in sums.items()}
    return {"samples": len(rows), **means}


def _rows(batch: PolicyBatch, rows: slice) -> PolicyBatch:
    """Some samples of a batch."""
    seen = batch.observation
    observation = replace(
        seen,
        instruction=seen.instruction[rows],
        proprio=None if seen.proprio is None else seen.proprio[rows],
        images={view: pixels[rows] for view, pixels in seen.images.items()},
    )
    return replace(
        batch,
        observation=observation,
        actions=batch.actions[rows],
        real=batch.real[rows],
        codes=batch.codes[rows],
        text=None if batch.text is None else batch.text[rows],
        after=None if batch.after is None else batch.after[rows],
    )
