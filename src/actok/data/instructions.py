"""What was asked for at each frame, in words: the task instruction and the sub-task that is active."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from actok.data.episodes import Episode, EpisodeDataset
from actok.data.resample import states_at

# How a sub-task is put after the instruction, unless its own words repeat the instruction.
_NUMBERED = re.compile(r"^(phase \d+) of \d+$")
PROMPT = "{instruction}. Current step: {subtask}."
# Words before the verb of an instruction.
POLITE = frozenset(["please"])

__all__ = ["PROMPT", "FrameLabels", "Labels", "chunk_labels", "frame_texts", "verb_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """One label a frame.

    Attributes:
        ids: int32 [N] into `names`, -1 where there is none.
        names: in the order of their first frames.
    """

    ids: Int[np.ndarray, "N"]
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameLabels:
    """What each of the N frames of a dataset is about. Frame t of episode e is row offsets[e] + t.

    Attributes:
        offsets: int64 [E + 1].
        task: the task key, where there is none the instruction.
        instruction: the instruction, where there is none the task key.
        subtask: the sub-task in full ("open the drawer, phase 1 of 3").
        phase: the sub-task without the words of the instruction ("phase 1", "grasp"), so that tasks share phases.
        verb: first word of the instruction.
    """

    offsets: Int[np.ndarray, "_"]
    task: Labels
    instruction: Labels
    subtask: Labels
    phase: Labels
    verb: Labels


def frame_texts(
    episode: Episode, from_hz: float | None = None, rate_hz: float | None = None
) -> tuple[list[str], Int[np.ndarray, "T"]]:
    """The distinct texts of an episode and which of them each frame has, int32 [T].

    A text is the task instruction (else the task key) and the sub-task active at the frame, where there is one: as in
    `PROMPT`, or the sub-task alone where its words contain the instruction. Phases that are only numbered are worded
    "<instruction>, phase k of n". "" where the dataset says nothing. With `rate_hz` the frames are those of the episode
    resampled from `from_hz`, each with the text in force at its time.
    """
    instruction = _instruction(episode)
    ids: np.ndarray
    if episode.subtask is None:
        texts, ids = [instruction], np.zeros(len(episode), np.int32)
    else:
        full = _subtask_texts(episode)
        active = [instruction, *(_prompt(instruction, subtask) for subtask in full)]
        found, ids = np.unique(episode.subtask + 1, return_inverse=True)
        texts = list(dict.fromkeys(active[i] for i in found))  # two sub-tasks may have the same words
        ids = np.array([texts.index(active[i]) for i in found], np.int32)[ids]
    if rate_hz is not None:
        ids = ids[states_at(len(episode), from_hz, rate_hz)]
    return texts, ids


def chunk_labels(dataset: EpisodeDataset, rate_hz: float | None = None) -> FrameLabels:
    """Labels of every frame, in one pass over the episodes, resampled to `rate_hz` where one is given."""
    tables: dict[str, dict[str, int]] = {k: {} for k in ("task", "instruction", "subtask", "phase", "verb")}
    rows: dict[str, list[np.ndarray]] = {k: [] for k in tables}
    offsets = [0]
    for episode in dataset:
        steps = np.arange(len(episode))
        if rate_hz is not None:
            steps = states_at(len(episode), dataset.space.rate_hz, rate_hz)
        instruction = _instruction(episode)
        whole = {
            "task": episode.task or instruction,
            "instruction": instruction,
            "verb": verb_of(instruction),
        }
        for key, name in whole.items():
            rows[key].append(np.full(len(steps), _ids([name], tables[key])[0], np.int32))
        subtasks = () if episode.subtask is None else _subtask_texts(episode)
        active = np.full(len(steps), -1) if episode.subtask is None else episode.subtask[steps]
        for key, names in (("subtask", subtasks), ("phase", [_phase(instruction, s) for s in subtasks])):
            used, place = np.unique(active, return_inverse=True)
            ids = _ids(["" if i < 0 else names[i] for i in used], tables[key])
            rows[key].append(ids[place])
        offsets.append(offsets[-1] + len(steps))
    labels = {k: Labels(ids=np.concatenate(rows[k]), names=tuple(tables[k])) for k in tables}
    return FrameLabels(offsets=np.array(offsets, np.int64), **labels)


def verb_of(text: str) -> str:
    """First word of an instruction or task key in lower case: "pick" of "Please pick up the cup" and of "pick-place-v3".

    Digits, marks and "please" are passed over; "" where no word is left.
    """
    return next((w for w in re.findall(r"[^\W\d_]+", text.lower()) if w not in POLITE), "")


def _ids(names: Iterable[str], table: dict[str, int]) -> Int[np.ndarray, "_"]:
    return np.array([table.setdefault(n, len(table)) if n else -1 for n in names], np.int32)


def _instruction(episode: Episode) -> str:
    return episode.instruction.strip() or episode.task.strip()


def _subtask_texts(episode: Episode) -> tuple[str, ...]:
    """Names of the sub-tasks; where they are mere numbers, in words."""
    names = episode.subtask_names
    if names and all(name == str(i) for i, name in enumerate(names)):
        task = _instruction(episode)
        words = tuple(f"phase {i + 1} of {len(names)}" for i in range(len(names)))
        return tuple(f"{task}, {word}" for word in words) if task else words
    return names


def _prompt(instruction: str, subtask: str) -> str:
    if not subtask or not instruction:
        return subtask or instruction
    if instruction.lower() in subtask.lower():
        return subtask
    return PROMPT.format(instruction=instruction.rstrip("."), subtask=subtask.rstrip("."))


def _phase(instruction: str, subtask: str) -> str:
    """A sub-task without the instruction that it begins with, in full where nothing else is left; of one that is only
    numbered its number alone, since how many there are tells the task."""
    if instruction and subtask.lower().startswith(instruction.lower()):
        subtask = subtask[len(instruction) :].strip(" ,.:;-") or subtask
    return _NUMBERED.sub(r"\1", subtask)
