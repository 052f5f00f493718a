"""From chunks and a learned tokenizer's class to a trained tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from actok.alignment.store import short_hash
from actok.core import ActionTokenizer, FitPart
from actok.training.config import FINISH_CHUNKS, TrainConfig
from actok.training.engine import Trained, Trainer
from actok.training.evaluate import HeldOutChunks, judge
from actok.training.run_folder import RunFolder
from actok.training.sources import Source

if TYPE_CHECKING:
    from actok.alignment.objectives import AlignmentConfig
    from actok.tokenizers.neural import NeuralTokenizer
    from actok.training.fitting import Material

__all__ = ["train_materials", "train_parts"]


def train_parts(
    target: Any,
    config: Any,
    training: TrainConfig,
    parts: Sequence[FitPart],
    *,
    alignment: AlignmentConfig | None = None,
) -> ActionTokenizer:
    """Train a tokenizer of class `target` on chunks in memory; the last weights are kept."""
    tokenizer = target.prepare(parts, config, seed=training.seed)
    sources = [Source.of_part(p) for p in parts]
    trained = Trainer(tokenizer, sources, training, **_heads(tokenizer, alignment, sources, training.seed)).run()
    return _finished(trained, parts)


def _heads(
    tokenizer: NeuralTokenizer, alignment: AlignmentConfig | None, sources: Sequence[Source], seed: int
) -> dict[str, Any]:
    """The trainer's arguments about semantic objectives, initial weights drawn from the seed; none without objectives."""
    if alignment is None:
        return {}
    from actok.alignment.objectives import SemanticHeads

    stores = [s.features for s in sources if s.features is not None]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        heads = SemanticHeads(
            alignment,
            dim=tokenizer.codec.quantizer.dim,
            sizes=tokenizer.codec.quantizer.sizes,
            feature_dim=stores[0].dim if stores else None,
        )
    return {"heads": heads, "masking_from": alignment.masking_after}


def train_materials(
    name: str,
    target: Any,
    config: Any,
    training: TrainConfig,
    materials: Sequence[Material],
    *,
    ratios: Sequence[float] | Literal["size"] = "size",
    alignment: AlignmentConfig | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> ActionTokenizer:
    """Train on datasets, judged on their validation episodes where there are any; the best weights are kept.

    Args:
        name: of the preset, for messages.
        target: class of the tokenizer.
        config: its settings.
        training: how to train.
        materials: one per dataset; the embodiments' names and statistics are settled.
        ratios: of the datasets.
        alignment: semantic objectives; those that need a teacher read the materials' features. None: none.
        run: folder for log and checkpoints, None for none.
        resume: go on where the run in that folder stands.
        progress: tell on stderr.

    Raises:
        ConfigError, DataError, SpaceMismatchError: before training. TrainingError, TrainingStopped: as `Trainer.run`.
    """
    main = int(os.environ.get("RANK", "0")) == 0
    parts = [m.train for m in materials]
    tokenizer = target.prepare(parts, config, seed=training.seed)
    sources = [Source.of_chunks(m.pool, m.train.space.embodiment, m.rows, features=m.features) for m in materials]
    held_out = [
        HeldOutChunks.of(
            m.origin["name"], m.validation, m.anchors["validation"], m.train.statistics, training.eval_chunks
        )
        for m in materials
        if m.validation is not None
    ]
    folder = None
    if run is not None:
        identity = _identity(name, config, materials, training, ratios, alignment)
        folder = RunFolder(run, identity, resume=resume, main=main)
    trainer = Trainer(
        tokenizer,
        sources,
        training,
        ratios=ratios,
        judge=partial(judge, datasets=held_out) if held_out else None,
        folder=folder,
        progress=progress,
        **_heads(tokenizer, alignment, sources, training.seed),
    )
    resumed = trainer.resume()
    if trainer.report.progress:
        _announce(name, trainer, sources, held_out, resumed)
    trained = trainer.run()
    finished = _finished(trained, parts)
    if folder is not None and main:
        folder.finish(trained.summary)
    return finished


def _finished(trained: Trained, parts: Sequence[FitPart]) -> ActionTokenizer:
    each = max(1, FINISH_CHUNKS // len(parts))
    finished: ActionTokenizer = trained.tokenizer.finish([_sample(p, each) for p in parts])
    return finished.with_meta({"training": trained.summary})


def _sample(part: FitPart, most: int) -> FitPart:
    """At most so many chunks of a part, evenly spread."""
    if len(part.actions) <= most:
        return part
    rows = np.linspace(0, len(part.actions) - 1, most).round().astype(np.int64)
    pad = None if part.pad_mask is None else part.pad_mask[rows]
    anchor = None if part.anchor is None else part.anchor[rows]
    return replace(part, actions=part.actions[rows], pad_mask=pad, anchor=anchor)


def _identity(
    name: str,
    config: Any,
    materials: Sequence[Material],
    training: TrainConfig,
    ratios: Sequence[float] | str,
    alignment: AlignmentConfig | None,
) -> dict[str, Any]:
    """Everything that a run's outcome depends on, as JSON values."""
    data = []
    for material in materials:
        statistics = json.dumps(material.train.statistics.to_dict()).encode()
        data.append(
            {
                **material.origin,
                "embodiment": material.train.space.embodiment,
                "statistics": hashlib.sha256(statistics).hexdigest()[:16],
            }
        )
    settings = json.loads(json.dumps(asdict(config), default=str))
    shares = ratios if isinstance(ratios, str) else list(ratios)
    found = {"tokenizer": name, "settings": settings, "training": asdict(training), "ratios": shares, "data": data}
    if alignment is not None:
        stores = [m.features for m in materials if m.features is not None]
        found["alignment"] = {
            **asdict(alignment),
            "teachers": [dict(s.teacher) for s in stores],
            "features": [short_hash(s.meta["files"]) for s in stores],  # other views, stride or words: other features
        }
    return found


def _announce(
    name: str, trainer: Trainer, sources: Sequence[Source], held_out: Sequence[HeldOutChunks], resumed: bool
) -> None:
    """What is about to be trained, in a few lines on stderr."""
    config, count = trainer.config, sum(s.size for s in sources)
    for source in sources:
        tqdm.write(f"{source.name}: {source.size:,} training chunks of {trainer.tokenizer.horizon} steps", sys.stderr)
    judged = sum(len(h.part.actions) for h in held_out)
    every = f"every {config.eval_every} steps" if config.eval_every else "at the end"
    validation = f"judged on {judged:,} validation chunks {every}" if held_out else "nothing held out"
    processes = trainer.accelerator.num_processes
    tqdm.write(
        f"{name}: {trainer.parameters:,} parameters on {trainer.accelerator.device}"
        f"{f' in {processes} processes' if processes > 1 else ''}; {config.steps:,} steps of {config.batch_size} chunks,"
        f" {config.steps * config.batch_size / count:.1f} epochs; {validation}",
        sys.stderr,
    )
    if trainer.heads is not None:
        names = ", ".join(trainer.heads.names)
        teacher = next((s.features.teacher.get("model") for s in sources if s.features is not None), None)
        told = "" if teacher is None else f", features of {teacher}"
        tqdm.write(f"semantic objectives: {names}{told}", sys.stderr)
    if trainer.folder is not None:
        state = f"going on after step {trainer.done}" if resumed else "new"
        tqdm.write(f"run folder {trainer.folder.path} ({state})", sys.stderr)
