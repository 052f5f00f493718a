"""The tokenizers that are trained for the results: a table, and the steps that --calibrate found for each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actok.core import ConfigError, find_preset, merge_settings
from results.places import Places, Source

# Written by --calibrate and kept, so that results depend on steps, not on the speed of the machine they are made on.
STEPS = Path(__file__).with_name("steps.json")
HORIZON = 20
MINUTE = 60

__all__ = ["HORIZON", "JOBS", "STEPS", "Job", "calibrated_steps", "job_names"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One tokenizer to train.

    Attributes:
        name: folder and label.
        preset: of `actok list`.
        part: which pages it is for: "main", "matched" (bits), "ablation", "scaling", "left_out".
        settings: over the preset's.
        training: over the preset's.
        only: names of data sets; empty: all at hand.
        without: data sets left out.
        seconds: of one thread, for which steps are calibrated.
        pace: the job whose number of steps it takes, instead of steps of its own.
    """

    name: str
    preset: str
    part: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    only: Sequence[str] = ()
    without: Sequence[str] = ()
    seconds: float = 3 * MINUTE
    pace: str | None = None

    def sources(self, places: Places) -> list[Source] | None:
        """The data it is trained on; None where some of them are not at hand."""
        found = places.sources
        if any(name not in found for name in (*self.only, *self.without)):
            return None
        return [s for n, s in found.items() if (not self.only or n in self.only) and n not in self.without]

    def resolved(self, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """All settings of tokenizer and training, the preset's with the job's on top.

        A stage without quantiser keeps its share of the preset's steps.
        """
        preset = find_preset(self.preset)
        training = {**preset.training, "steps": steps, "eval_every": -(-steps // 4), "eval_chunks": 256}
        training["checkpoint_every"] = training["eval_every"]
        if before := preset.training.get("quantise_after"):
            training["quantise_after"] = round(before * steps / preset.training["steps"])
        training |= self.training
        return merge_settings(preset.settings, self.settings), training


# What is compared with itself only is trained in fewer steps, at a lower learning rate than the preset.
SHORT = {"learning_rate": 2e-3}


def _ablation(name: str, **settings: Any) -> Job:
    pace = None if name == "base" else "ablate-base"
    return Job(
        name=f"ablate-{name}",
        preset="fastervq-tiny",
        part="ablation",
        settings=settings,
        training=SHORT,
        seconds=2 * MINUTE,
        pace=pace,
    )


def _data(name: str, part: str, *, only: Sequence[str] = (), without: Sequence[str] = ()) -> Job:
    return Job(
        name=name,
        preset="fastervq-tiny",
        part=part,
        training=SHORT,
        only=only,
        without=without,
        seconds=2 * MINUTE,
        pace="ablate-base",
    )


PRESETS = ("vqbet", "minivla", "vqvla", "quest", "oat", "boat", "carp", "omnisat", "actioncodec")
# About the 252 bits a chunk of FASTerVQ's 21 tokens of 4096 codes.
MATCHED: Mapping[str, Mapping[str, Any]] = {
    "vqbet": {"quantizer": {"levels": 21, "codes": 4096}},
    "vqvla": {"quantizer": {"levels": 2, "codes": 1448}},  # of 3 x 4 latents, which 28 dimensions make
    "quest": {"downsample": 1, "quantizer": {"kind": "vq", "codes": 4096}},  # 20 tokens
    "oat": {"registers": 25},  # of 1000 codes
    "actioncodec": {"tokens": 21, "quantizer": {"codes": 4096}},
}
ROBOSUITE = ("robosuite", "robosuite_human_lift", "robosuite_human_handover")

# The longest first, so that two at a time end together.
JOBS: Mapping[str, Job] = {
    job.name: job
    for job in (
        Job(name="fastervq-tiny", preset="fastervq-tiny", part="main", seconds=15 * MINUTE),
        Job(
            name="fastervq-120",
            preset="fastervq-tiny",
            part="main",
            settings={"latent_parts": 4, "block": 4, "quantizer": {"codes": 1024}},
            only=("metaworld",),
            seconds=15 * MINUTE,
        ),
        *(Job(name=f"{name}-tiny", preset=f"{name}-tiny", part="main") for name in PRESETS),
        *(Job(name=f"{n}-252", preset=f"{n}-tiny", part="matched", settings=s) for n, s in MATCHED.items()),
        _ablation("base"),
        _ablation("cnn", arch="cnn"),
        _ablation("transformer", arch="transformer"),
        *(_ablation(f"codes-{codes}", quantizer={"codes": codes}) for codes in (512, 1024, 8192)),
        *(_ablation(f"levels-{levels}", quantizer={"levels": levels}) for levels in (1, 2, 8)),
        _data("scale-s", "scaling", only=("metaworld", "bridge_widowx")),
        _data("scale-l", "scaling", only=("metaworld", "bridge_widowx", "robosuite", "libero")),
        _data("without-robosuite", "left_out", without=ROBOSUITE),
        _data("without-unitree", "left_out", without=("unitree_g1_inspire",)),
    )
}


def job_names(wanted: Sequence[str]) -> list[str]:
    """The named jobs, or all. Raises ConfigError for an unknown one."""
    if unknown := [name for name in wanted if name not in JOBS]:
        raise ConfigError(f"there is no job {unknown[0]!r}; there are: {', '.join(JOBS)}")
    return [name for name in JOBS if not wanted or name in wanted]


def calibrated_steps(job: Job, scale: float = 1.0) -> int:
    """Steps that the job is trained for. Raises ConfigError where nothing was calibrated."""
    found = json.loads(STEPS.read_text())["jobs"] if STEPS.exists() else {}
    if (name := job.pace or job.name) not in found:
        raise ConfigError(f"no steps are known for job {name!r}; run make_results.py --only calibrate first")
    return max(8, round(found[name]["steps"] * scale))
