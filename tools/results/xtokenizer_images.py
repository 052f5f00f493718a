"""Features that see: X-Tokenizer aligned with a teacher of images and words, with one of words alone, and with none.

The teacher is `actok teacher`, trained here on the data sets with images; features of images and words are `actok features`
of the first of them. Three variants of xtokenizer-tiny are trained on its training episodes, alike but for the features, and
judged by `actok bench --semantics` on held-out episodes

    own      of the same data set; words are looked for with the teacher's own features
    new      of recordings of the same tasks without images, from other starts, with probes fitted on their training episodes

Work files are in runs/results/semantic, like those of xtokenizer.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from results.jobs import HORIZON
from results.places import SEED, Source
from results.training import Task, kept_specification, run_tasks
from results.xtokenizer import (
    ABLATION_STEPS,
    IMAGES,
    NONE,
    SEEDS,
    SemanticJob,
    Workshop,
    X,
    extract_features,
    finished,
    train_semantic,
)

DATA = "metaworld_img64"
# The same tasks, more episodes, no images: below DATA_ROOT.
NEW = "sim/metaworld_state"
TEACHER_STEPS = 800
VARIANTS = ("images", "words", "neither")
JUDGED = ("own", "new")

__all__ = [
    "DATA",
    "IMAGE_JOBS",
    "JUDGED",
    "NEW",
    "TEACHER_STEPS",
    "VARIANTS",
    "at_hand",
    "features_that_see",
    "judge_images",
    "of_variant",
    "scene_teacher",
    "teacher_facts",
    "teacher_of",
    "train_images",
    "train_scene_teacher",
]


def _job(variant: str, seed: int) -> SemanticJob:
    plain = variant == "neither"
    return SemanticJob(
        name=f"{variant}-{seed}",
        preset=X,
        part="images",
        only=(DATA,),
        training={"seed": seed},
        steps=ABLATION_STEPS,
        features=not plain,
        align=NONE if plain else {},
    )


IMAGE_JOBS: Mapping[str, SemanticJob] = {
    job.name: job for job in (_job(variant, seed) for seed in SEEDS for variant in VARIANTS)
}


def of_variant(variant: str) -> dict[str, SemanticJob]:
    """Its jobs."""
    return {name: job for name, job in IMAGE_JOBS.items() if name.rpartition("-")[0] == variant}


def at_hand(work: Workshop) -> bool:
    """Whether every data set with images is."""
    return len(work.images) == len(IMAGES)


# -- the teacher ------------------------------------------------------------------------------------------------------


def scene_teacher(work: Workshop) -> Path:
    """Folder of the trained teacher."""
    return work.root / "scene" / "scene-teacher"


def teacher_of(variant: str, work: Workshop) -> Workshop:
    """The workshop with the teacher of a variant."""
    return replace(work, teacher=str(scene_teacher(work))) if variant == "images" else work


def teacher_facts(work: Workshop) -> dict[str, Any] | None:
    """What its training says of it; None where it is not trained."""
    config = scene_teacher(work) / "config.json"
    return json.loads(config.read_bytes())["training"] if config.exists() else None


def train_scene_teacher(work: Workshop, *, say: Callable[[str], None] = print) -> list[str]:
    """`actok teacher` on the data sets with images; kept while the same is asked for. Names what failed."""
    if not at_hand(work):
        say(f"scene-teacher: left out, {' and '.join(IMAGES)} are not at hand")
        return []
    steps = max(2, round(TEACHER_STEPS * work.places.scale))
    spec = {"data": [source.identity() for source in work.images.values()], "steps": steps, "seed": SEED}
    folder = scene_teacher(work)
    if (folder / "config.json").exists() and kept_specification(folder.parent) == spec:
        say("scene-teacher: kept")
        return []
    command = [sys.executable, "-m", "actok", "teacher", "--data", *(source.path for source in work.images.values())]
    command += ["--out", str(folder), "--steps", str(steps), "--seed", str(SEED)]
    task = Task(name="scene-teacher", folder=folder.parent, spec=spec, files={}, command=command, said=f"{steps} steps")
    return run_tasks([task], work.places, jobs=1, say=say)


def features_that_see(work: Workshop, *, jobs: int, say: Callable[[str], None] = print) -> list[str]:
    """The teacher, then features of every frame by it and by the teacher of words; what failed is named."""
    failed = train_scene_teacher(work, say=say)
    if failed or not at_hand(work):
        return failed
    for variant in ("images", "words"):
        failed += extract_features(teacher_of(variant, work), jobs=jobs, chosen=of_variant(variant), say=say)
    return failed


# -- tokenizers -------------------------------------------------------------------------------------------------------


def train_images(
    work: Workshop,
    *,
    jobs: int,
    chosen: Mapping[str, SemanticJob] = IMAGE_JOBS,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Train the variants, each with its teacher's features; those that failed are returned and may be tried again."""
    if not at_hand(work) or teacher_facts(work) is None:
        say("images: left out, the teacher is not trained")
        return []
    failed = []
    for variant in VARIANTS:
        some = {name: job for name, job in of_variant(variant).items() if name in chosen}
        failed += train_semantic(teacher_of(variant, work), jobs=jobs, chosen=some, say=say)
    return failed


def judge_images(work: Workshop, *, jobs: int, say: Callable[[str], None] = print) -> list[str]:
    """`actok bench --semantics` of the finished jobs on both sets of held-out episodes; what failed is named."""
    names = [n for n, job in IMAGE_JOBS.items() if finished(job, teacher_of(n.rpartition("-")[0], work))]
    if not names:
        return []
    tasks = []
    for judged in JUDGED:
        source = work.images[DATA] if judged == "own" else _new_episodes(work)
        if source is None:
            say(f"images: {NEW} is not at hand")
            continue
        given = ",".join(str(work.tokenizer(name)) for name in names)
        command = [sys.executable, "-m", "actok", "bench", "--data", source.path, "--tokenizers", given]
        command += ["--horizon", str(HORIZON), "--seed", str(SEED), "--semantics"]
        command += ["--out", str(work.root / "bench" / f"images-{judged}")]
        if judged == "own":
            command += ["--features", str(teacher_of("images", work).features)]
        tasks.append(
            Task(
                name=f"bench of images, {judged} episodes",
                folder=work.root / "bench" / f"log-images-{judged}",
                spec={"tokenizers": names},
                files={},
                command=command,
                said=f"{len(names)} tokenizers",
            )
        )
    return run_tasks(tasks, work.places, jobs=jobs, say=say)


def _new_episodes(work: Workshop) -> Source | None:
    """A folder of links to the recordings, without images, of the tasks that DATA has; None where one is missing."""
    root = work.places.data_root
    if root is None:
        return None
    tasks = sorted(path.name for path in Path(work.images[DATA].path).glob("*.npz"))
    files = [root / NEW / name for name in tasks]
    if not all(path.exists() for path in files):
        return None
    folder = work.root / "scene-data" / "metaworld_new"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for path in files:
        (folder / path.name).symlink_to(path.resolve())
    return Source(name=folder.name, path=str(folder))
