"""The training loop of every learned tokenizer, on accelerate: one process or many, CPU or CUDA.

Two things make a run repeatable and resuming exact. The batch of a step is a pure function of the seed and the step
(`MixtureSampler.samples`), and so is the state of torch's random generators at its start, so neither is stored.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from actok.core import ConfigError, MissingExtraError
from actok.data.mixtures import MixtureSampler
from actok.quantizers import Quantizer
from actok.quantizers.codebook import Codebook
from actok.tokenizers.neural import join
from actok.training.checkpoint import Checkpoint
from actok.training.config import TrainConfig
from actok.training.health import Health
from actok.training.model import Aligned, parameter_groups, pinned
from actok.training.report import Report, flat
from actok.training.run_folder import RunFolder, check_trackers
from actok.training.sources import Batches, Prefetcher, Source, TrainBatch
from actok.training.stopping import StopSignals, TrainingStopped, explain

if TYPE_CHECKING:
    from accelerate import Accelerator

    from actok.alignment.objectives import SemanticHeads
    from actok.tokenizers.neural import NeuralTokenizer

# How long a process waits for the others before it counts as hung.
RANK_TIMEOUT = timedelta(minutes=10)
# With several processes, they agree on stopping every so many steps.
AGREE_EVERY = 10
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


class Trainer:
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
        self.tokenizer, self.config, self.judge, self.folder = tokenizer, config, judge, folder
        self.masking_from = max(config.unquantised, round(masking_from * config.steps))
        self.accelerator = _accelerator(config, folder)
        self.sampler = MixtureSampler(
            [s.size for s in sources], ratios=ratios, batch_size=config.batch_size, seed=config.seed
        )
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.batches = Batches(tokenizer, sources, self.sampler, rank=rank, ranks=ranks)
        self.sampler.samples(0, rank=rank, ranks=ranks)  # refuses a batch that cannot be divided, before anything runs
        self.codec = copy.deepcopy(tokenizer.codec).train().requires_grad_(True)
        self.heads = heads
        if config.compile:
            self.codec.compile()
        model = Aligned(self.codec, heads)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=config.betas, fused=True
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.quantizers = [m for m in self.codec.modules() if isinstance(m, Quantizer)]
        self.codebooks = [m for m in self.codec.modules() if isinstance(m, Codebook)]
        self.names = {name: p for name, p in self.codec.named_parameters() if p.requires_grad}
        self.ema: dict[str, Tensor] = {}
        if config.weight_ema:
            self.ema = {name: p.detach().clone() for name, p in self.names.items()}
        self.health = Health(self.codec.quantizer.sizes, max(config.warmup, 2 * config.unquantised))
        self.report = Report(
            self.accelerator,
            config,
            folder,
            self.health,
            name=f"training {tokenizer.kind}",
            progress=progress and self.accelerator.is_main_process,
        )
        self.done = 0
        self.seconds = 0.0
        self.waited = 0.0
        self.best: dict[str, Any] | None = None
        self.best_state: dict[str, Tensor] | None = None

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> Trained:
        """Train from where the run stands to its last step.

        Raises TrainingError where it cannot go on, TrainingStopped where SIGTERM or Ctrl-C ended it after a whole step.
        """
        config, started, before, waited = self.config, time.perf_counter(), self.seconds, self.waited
        cuda = self.accelerator.device.type == "cuda"
        with (
            torch.random.fork_rng(devices=[self.accelerator.device] if cuda else []),
            StopSignals() as signals,
            Prefetcher(self.batches.at, self.done, config.steps, pinned if cuda else None) as feed,
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
                    if found := explain(error, step + 1, config.batch_size, self.accelerator.num_processes):
                        raise found from error
                    raise
                if stopping and self.done < config.steps:
                    where = (
                        f"saved in {self.folder.path}" if self.folder else "nothing kept, since it has no run folder"
                    )
                    raise TrainingStopped(f"stopped after step {self.done} of {config.steps}, {where}")
        return Trained(tokenizer=self.tokenizer.with_weights(self.best_state or self._state()), summary=self._summary())

    def _after_step(self, stopping: bool, waited: float) -> None:
        """What is due after the step just done: log, evaluation, checkpoint, in this order."""
        config = self.config
        last = self.done == config.steps
        judging = self.judge is not None and (last or (config.eval_every > 0 and self.done % config.eval_every == 0))
        judging = judging and self.done > config.unquantised
        saving = self.folder is not None and (
            last or stopping or (config.checkpoint_every > 0 and self.done % config.checkpoint_every == 0)
        )
        if last or stopping or judging or saving or self.done % config.log_every == 0:
            self.report.read(self.done, waited)
        if judging:
            self._judge()
        if saving:
            self._save()

    def _step(self, step: int, batch: TrainBatch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(step)
        torch.manual_seed(_mixed(self.config.seed, step, self.accelerator.process_index))
        device = self.accelerator.device
        if self.config.unquantised:
            for quantizer in self.quantizers:
                quantizer.bypassed = step < self.config.unquantised
            if step == self.config.unquantised:
                self._start_codebooks(step)
        self._anneal(step)
        if self.heads is not None:
            self.heads.masking_on = step >= self.masking_from
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self.model(batch.to(device))
        loss = torch.stack([value.float() for value in output.losses.values()]).sum()
        self.accelerator.backward(loss)
        norm = None
        if self.config.clip_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            decay = min(self.config.weight_ema, (1 + step) / (10 + step))  # so that the initial weights are forgotten
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.names.values()], 1 - decay)
        self.report.step(output, norm)

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
        """How many numbers of the codec are trained by gradient."""
        return sum(p.numel() for p in self.names.values())

    # -- evaluation -----------------------------------------------------------------------------------------------

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
        self.report.validation(metrics, time.perf_counter() - before)

    # -- state ----------------------------------------------------------------------------------------------------

    def _trained(self) -> dict[str, nn.Parameter]:
        """All parameters of the optimiser by name, the heads' with a prefix of their own."""
        heads = {} if self.heads is None else {f"heads.{n}": p for n, p in self.heads.named_parameters()}
        return {**self.names, **heads}

    def _state(self) -> dict[str, Tensor]:
        """The weights to evaluate and keep: averaged where they are, codebooks as they stand."""
        return {**self.codec.state_dict(), **self.ema}

    def _save(self) -> None:
        assert self.folder is not None
        if self.accelerator.is_main_process:
            self.folder.save(self._checkpoint())
        self.accelerator.wait_for_everyone()

    def _checkpoint(self) -> Checkpoint:
        optimizer = {
            f"{name}/{key}": value
            for name, parameter in self._trained().items()
            for key, value in self.optimizer.state[parameter].items()
        }
        tensors = {
            "model": self.codec.state_dict(),
            "heads": {} if self.heads is None else self.heads.state_dict(),
            "ema": self.ema,
            "optimizer": optimizer,
            "best": self.best_state or {},
        }
        facts = {
            "seconds": self.seconds,
            "waited": self.waited,
            "best": self.best,
            "health": self.health.state(),
        }
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
        self.codec.load_state_dict(tensors["model"])
        if self.heads is not None:
            self.heads.load_state_dict(tensors["heads"])
        names = self._trained()
        self.ema = {name: tensors["ema"][name].to(device) for name in self.ema}
        for key, value in tensors["optimizer"].items():
            name, _, entry = key.rpartition("/")
            self.optimizer.state[names[name]][entry] = value.to(device)
        self.best, self.best_state = facts["best"], dict(tensors["best"]) or None
        self.health.restore(facts["health"])
        self._anneal(checkpoint.step - 1)  # the pace is in no file, and codebooks that start now do so at the last one
        self.done, self.seconds, self.waited = checkpoint.step, facts["seconds"], facts["waited"]

    def _summary(self) -> dict[str, Any]:
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
            "validation": self.best,
            "warnings": list(self.health.warned),
        }


def _accelerator(config: TrainConfig, folder: RunFolder | None) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration
    except ImportError as error:
        raise MissingExtraError("accelerate", "torch", "training") from error

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
            f"accelerate was started for {accelerator.distributed_type}; codecs are small, so every process holds a whole one:"
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
