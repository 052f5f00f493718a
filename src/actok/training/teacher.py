"""Training of the small vision-language teacher (`alignment/scene.py`) on the images and texts of datasets.

The training episodes are those that `actok fit` trains on with the same seed, so a teacher has seen no test episode of a
tokenizer that is aligned with it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from tqdm import tqdm

from actok.alignment.scene import SceneConfig, SceneModel, Vocabulary, contrastive_loss, save_scene
from actok.core import ConfigError
from actok.core.provenance import circumstances
from actok.data import open_dataset
from actok.data.episodes import EpisodeDataset
from actok.training.sources import TrainingError
from actok.training.teacher_frames import Frames, read_frames

WARMUP_SHARE, WEIGHT_DECAY = 0.1, 0.05
# In training, images move by up to this share of their side and their brightness by this share; each view but one may be
# absent, and so may each piece of a word: what is read later is not exactly what was trained on.
SHIFT_SHARE, BRIGHTNESS, VIEW_DROP, PIECE_DROP = 1 / 16, 0.2, 0.25, 0.1

__all__ = ["Retrieval", "TeacherReport", "TeacherTraining", "held_out_retrieval", "train_teacher"]


@dataclass(frozen=True, kw_only=True)
class TeacherTraining:
    """How to train.

    Attributes:
        steps: of the optimiser.
        batch_size: frames of a step.
        learning_rate: peak; warm-up over a tenth of the steps, then a cosine to 0.
        seed: of the split, the initial weights and the batches.
    """

    steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 2), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least {least}")
        if not (isinstance(self.learning_rate, float) and 0 < self.learning_rate < math.inf):
            raise ConfigError(f"learning_rate is {self.learning_rate!r}; give a number above 0")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps - 1."""
        warmup = max(1, round(WARMUP_SHARE * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup))) / 2


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How well held-out images find their words. Shares in 0..1.

    Attributes:
        frames: held-out frames.
        texts: distinct texts they choose from, those of training episodes included.
        recall_1, recall_5: the frame's own text is the nearest, or among the five nearest.
        chance_1, chance_5: the same for a random order of the texts.
        task: the nearest text belongs to the frame's instruction; task_chance: of a random text.
        phase: among the texts of the frame's instruction, its own is the nearest; over the frames whose instruction has
            several texts, None where none has.
        phase_usual: the same for always answering the instruction's most frequent text of the training frames.
    """

    frames: int
    texts: int
    recall_1: float
    recall_5: float
    chance_1: float
    chance_5: float
    task: float
    task_chance: float
    phase: float | None
    phase_usual: float | None

    def __str__(self) -> str:
        words = (
            f"{self.frames} held-out images among {self.texts} texts: R@1 {self.recall_1:.1%} (chance {self.chance_1:.1%}),"
            f" R@5 {self.recall_5:.1%} ({self.chance_5:.1%}), right task {self.task:.1%} ({self.task_chance:.1%})"
        )
        if self.phase is None:
            return words
        return f"{words}, right phase of the known task {self.phase:.1%} (always the usual one: {self.phase_usual:.1%})"


@dataclass(frozen=True, kw_only=True)
class TeacherReport:
    """What a training gave.

    Attributes:
        folder: of the teacher.
        episodes, frames, images, texts: trained on.
        stride: every so many frames of an episode were taken.
        loss: mean of the last tenth of the steps.
        seconds: of training alone.
        held_out: None where every episode was needed for training.
    """

    folder: Path
    episodes: int
    frames: int
    images: int
    texts: int
    stride: int
    loss: float
    seconds: float
    held_out: Retrieval | None


def train_teacher(
    data: Any,
    out: str | Path,
    *,
    training: TeacherTraining | None = None,
    config: SceneConfig | None = None,
    views: Sequence[str] | None = None,
    device: str | None = None,
    progress: bool = True,
) -> TeacherReport:
    """Train a teacher on datasets with images and save it.

    Args:
        data: what `open_dataset` takes, or a list of several.
        out: new or empty folder.
        training, config: how, and how large.
        views: names of at most three views to use, in order; None: the first three of each dataset.
        device: None: CUDA where there is one, else the CPU. On one device the result is a function of the arguments.
        progress: show a bar on stderr.

    Raises:
        ConfigError: `out` holds something, or a setting is impossible.
        DataError: a dataset has no images, not the views asked for, or no text; or all frames have the same text.
        TrainingError: the loss is no longer finite.
    """
    training, config, out = training or TeacherTraining(), config or SceneConfig(), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; name a new folder for the teacher (--out)")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    many = isinstance(data, (list, tuple)) and bool(data) and isinstance(data[0], (str, Path, EpisodeDataset))
    datasets = [open_dataset(source) for source in (data if many else [data])]
    frames, texts, facts = read_frames(datasets, config.image_size, training.seed, views, progress)
    trained = ~frames.held_out
    vocabulary = Vocabulary.fit(texts[i] for i in np.unique(frames.text[trained]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = SceneModel(config, vocabulary).to(device)
    started = time.perf_counter()
    loss = _train(model, frames, texts, training, progress)
    seconds = time.perf_counter() - started
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss of the teacher became {loss}; train it with a learning_rate below {training.learning_rate:g}"
        )
    found = held_out_retrieval(model, frames, texts) if frames.held_out.any() else None
    facts |= {
        "training": asdict(training),
        "loss": loss,
        "seconds": seconds,
        "device": device,
        "held_out": None if found is None else asdict(found),
        **circumstances(("numpy", "torch")),
    }
    return TeacherReport(
        folder=save_scene(model, out, facts),
        episodes=facts["episodes"],
        frames=int(trained.sum()),
        images=int((frames.image_of[trained] >= 0).sum()),
        texts=len(np.unique(frames.text[trained])),
        stride=facts["stride"],
        loss=loss,
        seconds=seconds,
        held_out=found,
    )


@torch.inference_mode()
def held_out_retrieval(model: SceneModel, frames: Frames, texts: Sequence[str], batch_size: int = 256) -> Retrieval:
    """Look for the text of every held-out frame among all texts."""
    model.eval()
    device = model.log_scale.device
    words = [model.vocabulary.rows(text) for text in texts]
    every = torch.cat([model.text(words[i : i + batch_size]) for i in range(0, len(words), batch_size)])
    rows = np.flatnonzero(frames.held_out)
    similarity = np.concatenate(
        [
            (model.image(*(x.to(device) for x in frames.views(rows[i : i + batch_size]))) @ every.T).cpu().numpy()
            for i in range(0, len(rows), batch_size)
        ]
    )
    return _retrieval(similarity, frames, rows)


def _retrieval(similarity: Float[np.ndarray, "N M"], frames: Frames, rows: np.ndarray) -> Retrieval:
    count = similarity.shape[1]
    text, task = frames.text[rows], frames.task[rows]
    own = similarity[np.arange(len(rows)), text][:, None]
    rank = (similarity > own).sum(1)
    task_of = np.zeros((frames.task.max() + 1, count), bool)  # which texts occur under which instruction
    task_of[frames.task, frames.text] = True
    several = task_of[task].sum(1) > 1
    within = np.where(task_of[task], similarity, -np.inf)
    seen = np.zeros(task_of.shape, np.int64)
    np.add.at(seen, (frames.task[~frames.held_out], frames.text[~frames.held_out]), 1)
    usual = seen.argmax(1)[task]
    return Retrieval(
        frames=len(rows),
        texts=count,
        recall_1=float((rank < 1).mean()),
        recall_5=float((rank < 5).mean()),
        chance_1=1 / count,
        chance_5=min(5, count) / count,
        task=float(task_of[task, similarity.argmax(1)].mean()),
        task_chance=float(task_of[task].mean()),
        phase=float((within.argmax(1) == text)[several].mean()) if several.any() else None,
        phase_usual=float((usual == text)[several].mean()) if several.any() else None,
    )


# -- training -----------------------------------------------------------------------------------------------------


def _train(model: SceneModel, frames: Frames, texts: Sequence[str], training: TeacherTraining, progress: bool) -> float:
    """Returns the mean loss of the last tenth of the steps."""
    model.train()
    device = model.log_scale.device
    words = [model.vocabulary.rows(text) for text in texts]
    trained = np.flatnonzero(~frames.held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=WEIGHT_DECAY)
    losses = []
    steps = tqdm(
        range(training.steps), "training the teacher", unit="step", file=sys.stderr, delay=2, disable=not progress
    )
    for step in steps:
        rng = np.random.default_rng([training.seed, step])
        rows = rng.choice(trained, training.batch_size)
        present_texts, text_of = np.unique(frames.text[rows], return_inverse=True)
        images, present = frames.views(rows)
        present = torch.from_numpy(_thinned(present.numpy(), rng))
        images = torch.from_numpy(_varied(images.numpy(), rng))
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        loss = contrastive_loss(
            model.image(images.to(device), present.to(device)),
            model.text([_with_gaps(words[i], rng) for i in present_texts]),
            torch.from_numpy(text_of).to(device),
            model.scale,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 20 == 0:
            steps.set_postfix(loss=f"{float(loss.detach()):.3f}")
    return float(torch.stack(losses[-max(1, training.steps // 10) :]).mean())


def _thinned(present: Bool[np.ndarray, "B V"], rng: np.random.Generator) -> Bool[np.ndarray, "B V"]:
    """Some views dropped, never all of a moment."""
    kept = present & (rng.random(present.shape) >= VIEW_DROP)
    return np.where(kept.any(1, keepdims=True), kept, present)


def _varied(images: UInt8[np.ndarray, "B V H H 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "B V H H 3"]:
    """Each view moved by a few pixels (its border goes on outwards) and made brighter or darker."""
    count, views, size = images.shape[:3]
    most = round(SHIFT_SHARE * size)
    shift = rng.integers(-most, most + 1, (2, count, views, 1))
    y, x = np.clip(np.arange(size) + shift, 0, size - 1)
    b, v = np.arange(count)[:, None, None, None], np.arange(views)[None, :, None, None]
    moved = images[b, v, y[..., :, None], x[..., None, :]]
    gain = rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS, (count, views, 1, 1, 1)).astype(np.float32)
    return np.minimum(moved * gain, 255).astype(np.uint8)


def _with_gaps(words: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Some pieces dropped; a word without any left is the unknown one."""
    kept = (rows[rng.random(len(rows)) >= PIECE_DROP] for rows in words)
    return [rows if len(rows) else np.zeros(1, np.int64) for rows in kept]
