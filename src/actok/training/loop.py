"""The training loop of tokenizers and policies, on accelerate: one process or many, CPU or CUDA.

Two things make a run repeatable and resuming exact. The batch of a step is a pure function of the seed and the step
(`MixtureSampler.samples`), and so is the state of torch's random generators at its start, so neither is stored.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actok.core import ConfigError, MissingExtraError
from actok.data.mixtures import MixtureSampler
from actok.training.checkpoint import Checkpoint
from actok.training.config import TrainConfig
from actok.training.health import Health
from actok.training.model import parameter_groups
from actok.training.report import CodeUse, Report, flat
from actok.training.run_folder import RunFolder, check_trackers
from actok.training.sources import Prefetcher
from actok.training.stopping import StopSignals, TrainingStopped, explain

if TYPE_CHECKING:
    from accelerate import Accelerator

# How long a process waits for the others before it counts as hung.
RANK_TIMEOUT = timedelta(minutes=10)
# What accelerate would share a model out by, as its environment variables call it.
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
# With several processes, they agree on stopping every so many steps.
AGREE_EVERY = 10

__all__ = ["Loop"]


class Loop(ABC):
    """One training run of one module: steps, signals, log, checkpoints, resuming.

    Args:
        config: how to train.
        sizes: samples of each dataset.
        ratios: of the datasets; "size": every sample is as likely as any other.
        folder: where log and checkpoints go; None: nowhere.

    A subclass calls `_prepare` when it has its module, and defines what a batch is, what a step computes, and what belongs to
    its state. `done` is the number of steps done, `seconds` what they took, `waited` how much of it went by waiting for data.
    """

    # What to do where memory does not suffice for a step, in words.
    smaller = "make batch_size smaller (--batch-size)"

    def __init__(
        self,
        config: TrainConfig,
        sizes: Sequence[int],
        *,
        ratios: Sequence[float] | Literal["size"] = "size",
        folder: RunFolder | None = None,
    ) -> None:
        self.config, self.folder = config, folder
        self.accelerator = _accelerator(config, folder)
        self.sampler = MixtureSampler(sizes, ratios=ratios, batch_size=config.batch_size, seed=config.seed)
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        # Refuses a batch that cannot be divided, before anything runs.
        self.sampler.samples(0, rank=self.rank, ranks=self.ranks)
        self.done = 0
        self.seconds = 0.0
        self.waited = 0.0

    def _prepare(
        self,
        model: nn.Module,
        names: Mapping[str, nn.Parameter],
        *,
        title: str,
        levels: Sequence[int] = (),
        patience: int | None = None,
        progress: bool = True,
    ) -> None:
        """Make optimiser, moving averages, health and report for a module.

        Args:
            model: what a step calls; its parameters that require a gradient are optimised.
            names: parameters that a moving average is kept of, by name.
            title: shown on the bar.
            levels: codes of each codebook level whose use is watched.
            patience: first steps in which losses are not judged; None: the warm-up.
            progress: show a bar on stderr.
        """
        config = self.config
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=config.betas, fused=True
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.names = dict(names)
        self.ema: dict[str, Tensor] = {}
        if config.weight_ema:
            self.ema = {name: p.detach().clone() for name, p in self.names.items()}
        self.health = Health(levels, config.warmup if patience is None else patience)
        self.report = Report(
            self.accelerator,
            config,
            self.folder,
            self.health,
            name=title,
            progress=progress and self.accelerator.is_main_process,
        )

    # -- for subclasses -------------------------------------------------------------------------------------------

    @abstractmethod
    def _batch(self, step: int) -> Any:
        """What this process trains on in that step; called in a thread of its own."""

    def _pinned(self, batch: Any) -> Any:
        """The batch in page-locked memory, where there is a GPU."""
        return batch

    def _begin(self, step: int) -> None:  # noqa: B027 - most steps need nothing
        """What is due before the forward pass of a step."""

    @abstractmethod
    def _forward(self, batch: Any) -> tuple[Mapping[str, Tensor], CodeUse | None]:
        """Weighted losses by name, and the use of codes where there is one to watch. Called under autocast."""

    def _gradients(self, batch: Any) -> tuple[Mapping[str, Tensor], CodeUse | None]:
        """Forward and backward pass of a step; what `_forward` gives."""
        losses, use = self._losses(batch)
        self._backward(losses)
        return losses, use

    def _due(self) -> bool:
        """Whether an evaluation may take place after the step just done."""
        return True

    @abstractmethod
    def _judge(self) -> None:
        """Evaluate on validation samples and tell."""

    @abstractmethod
    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Tensors of a checkpoint by group, without moving averages and the optimiser's."""

    def _facts(self) -> dict[str, Any]:
        """JSON values of a checkpoint, beside those of the loop."""
        return {}

    @abstractmethod
    def _put_back(self, checkpoint: Checkpoint) -> None:
        """The inverse of `_tensors` and `_facts`."""

    def _trained(self) -> Mapping[str, nn.Parameter]:
        """All parameters of the optimiser by name."""
        return self.names

    # -- the loop -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Train from where the run stands to its last step.

        Raises TrainingError where it cannot go on, TrainingStopped where SIGTERM or Ctrl-C ended it after a whole step.
        """
        config, started, before, waited = self.config, time.perf_counter(), self.seconds, self.waited
        cuda = self.accelerator.device.type == "cuda"
        with (
            torch.random.fork_rng(devices=[self.accelerator.device] if cuda else []),
            StopSignals() as signals,
            Prefetcher(self._batch, self.done, config.steps, self._pinned if cuda else None) as feed,
            self.report.open(self.done),
        ):
            for step in range(self.done, config.steps):
                try:
                    self._step(step, feed.get(step))
                    self.done = step + 1
                    self.seconds, self.waited = before + time.perf_counter() - started, waited + feed.waited
                    stopping = self._agreed(signals.requested)
                    self._after_step(stopping, feed.waited)
                except (MemoryError, RuntimeError) as error:
                    processes = self.accelerator.num_processes
                    if found := explain(error, step + 1, config.batch_size, processes, self.smaller):
                        raise found from error
                    raise
                if stopping and self.done < config.steps:
                    where = (
                        f"saved in {self.folder.path}" if self.folder else "nothing kept, since it has no run folder"
                    )
                    raise TrainingStopped(f"stopped after step {self.done} of {config.steps}, {where}")

    def _after_step(self, stopping: bool, waited: float) -> None:
        """What is due after the step just done: log, evaluation, checkpoint, in this order."""
        config = self.config
        last = self.done == config.steps
        judging = (last or (config.eval_every > 0 and self.done % config.eval_every == 0)) and self._due()
        saving = self.folder is not None and (
            last or stopping or (config.checkpoint_every > 0 and self.done % config.checkpoint_every == 0)
        )
        if last or stopping or judging or saving or self.done % config.log_every == 0:
            self.report.read(self.done, waited)
        if judging:
            self._judge()
        if saving:
            self._save()

    def _step(self, step: int, batch: Any) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(step)
        torch.manual_seed(_mixed(self.config.seed, step, self.accelerator.process_index))
        self._begin(step)
        losses, use = self._gradients(batch)
        norm = None
        if self.config.clip_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            decay = min(self.config.weight_ema, (1 + step) / (10 + step))  # so that the initial weights are forgotten
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.names.values()], 1 - decay)
        self.report.step(losses, norm, use)

    def _losses(self, batch: Any) -> tuple[Mapping[str, Tensor], CodeUse | None]:
        """`_forward` on this process's device, at the run's precision."""
        device = self.accelerator.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self._forward(batch.to(device))

    def _backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add the gradient of the sum of these losses to that of every parameter."""
        self.accelerator.backward(torch.stack([value.float() for value in losses.values()]).sum())

    def _agreed(self, requested: bool) -> bool:
        """Whether to stop now: what this process wants, or any of several, which then all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return requested
        if self.done % AGREE_EVERY and self.done != self.config.steps:
            return False
        flag = torch.tensor([float(requested)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    @property
    def parameters(self) -> int:
        """How many numbers are trained by gradient, without those of heads that are dropped afterwards."""
        return sum(p.numel() for p in self.names.values())

    # -- state ----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        assert self.folder is not None
        if self.accelerator.is_main_process:
            self.folder.save(self._checkpoint())
        self.accelerator.wait_for_everyone()

    def _checkpoint(self) -> Checkpoint:
        optimizer = {
            f"{name}/{key}": value
            for name, parameter in self._trained().items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        facts = {"seconds": self.seconds, "waited": self.waited, **self._facts(), "health": self.health.state()}
        tensors = {**self._tensors(), "ema": self.ema, "optimizer": optimizer}
        return Checkpoint(step=self.done, tensors=tensors, facts=facts)

    def resume(self) -> bool:
        """Go to where the run folder's last checkpoint stands; False where there is none."""
        self.accelerator.wait_for_everyone()  # the first process may just have cleared the folder of a finished run
        checkpoint = None if self.folder is None else self.folder.latest()
        if checkpoint is not None:
            self.restore(checkpoint)
        if self.folder is not None and self.accelerator.is_main_process:
            self.folder.rewind(self.done)  # also where it ended before its first checkpoint
        return checkpoint is not None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put the run where a checkpoint of it stands."""
        tensors, facts, device = checkpoint.tensors, checkpoint.facts, self.accelerator.device
        self._put_back(checkpoint)
        names = self._trained()
        self.ema = {name: tensors["ema"][name].to(device) for name in self.ema}
        for key, value in tensors["optimizer"].items():
            name, _, entry = key.rpartition("/")
            self.optimizer.state[names[name]][entry] = value.to(device)
        self.health.restore(facts["health"])
        self.done, self.seconds, self.waited = checkpoint.step, facts["seconds"], facts["waited"]

    def _summary(self) -> dict[str, Any]:
        """JSON values on the run for an artifact's meta."""
        chunks = self.done * self.config.batch_size
        return {
            "config": asdict(self.config),
            "parameters": self.parameters,
            "steps": self.done,
            "epochs": chunks / sum(self.sampler.sizes),
            "seconds": self.seconds,
            "chunks_per_s": chunks / max(self.seconds, 1e-9),
            "waiting": self.waited / max(self.seconds, 1e-9),
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "warnings": list(self.health.warned),
        }


def _accelerator(config: TrainConfig, folder: RunFolder | None) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.utils import (
            DistributedDataParallelKwargs,
            InitProcessGroupKwargs,
            ProjectConfiguration,
            parse_flag_from_env,
        )
    except ImportError as error:
        raise MissingExtraError("accelerate", "torch", "training") from error

    # On CPUs accelerate leaves some of these out without a word.
    if asked := [name for name in SHARDING if parse_flag_from_env(f"ACCELERATE_USE_{name}")]:
        raise ConfigError(
            f"accelerate was configured for {' and '.join(asked)}, which cuts a model into parts; here every process holds a"
            " whole one: start with torchrun --nproc_per_node N, without an accelerate config"
        )
    check_trackers(config.track, folder)
    place = None if folder is None else str(folder.path)
    handlers = [
        InitProcessGroupKwargs(timeout=RANK_TIMEOUT),
        # A codec may leave parameters out of a step (dropped levels); quantisers keep their buffers equal themselves.
        DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
    ]
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # told nothing, it joins no other process on a machine without one
        log_with=list(config.track) or None,
        project_config=ProjectConfiguration(project_dir=place, logging_dir=place),
        kwargs_handlers=handlers,
    )
    if accelerator.mixed_precision not in ("no", config.precision):
        raise ConfigError(
            f"accelerate was started with mixed precision {accelerator.mixed_precision!r}, this run asks for"
            f" {config.precision!r}; leave it out there and set precision here"
        )
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        raise ConfigError(
            f"{world} processes were started, but accelerate joins {accelerator.num_processes}; start them with torchrun"
            " --nproc_per_node N, in an environment where accelerate was not used before"
        )
    if accelerator.distributed_type != "NO" and not accelerator.distributed_type.value.startswith("MULTI_"):
        raise ConfigError(
            f"accelerate was started for {accelerator.distributed_type}; every process holds a whole model:"
            " start with torchrun --nproc_per_node N, without an accelerate config"
        )
    if config.track:
        accelerator.init_trackers("tracks", config=flat(asdict(config)))
    return accelerator


def _mixed(*numbers: int) -> int:
    """One seed of 63 bits from several whole numbers (SplitMix64)."""
    value = 0
    for number in numbers:
        value = (value + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 1
