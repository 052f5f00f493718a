"""X-Tokenizer's results: which tokenizers are trained on which data with which objectives, and how.

Four steps, each resumable (work files in runs/results/semantic):

    features    a teacher's features of every frame, by `actok features`; achieved paths of robot arms as data sets
    train       the jobs of this table, by `actok fit`
    bench       xtokenizer_measure.py
    pages       xtokenizer_pages.py: docs/results/semantic

Beside them, in the same steps, a teacher that is shown images: xtokenizer_images.py.

The teacher is what `actok features --teacher` takes: a Hub id, or the folder of a sentence encoder, of a vision-language
model, or of `actok teacher`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from actok.benchmark.results import module_hash
from actok.core import DataError, find_preset
from actok.core.files import write_bytes
from actok.data import open_dataset
from actok.data.lerobot_write import write_lerobot
from actok.evaluation.achieved import achieved_poses
from actok.training.semantic import open_features
from results.jobs import HORIZON, Job
from results.places import METAWORLD, OTHERS, RATIOS, SEED, Places, Source
from results.training import Task, assignments, kept_specification, mixture, run_tasks

SEEDS = (0, 1, 2)
# Steps of gradient descent: the ablation, a tokenizer of all robots, a tokenizer of one.
ABLATION_STEPS, UNION_STEPS, ALONE_STEPS = 400, 600, 200
# Arms whose achieved end-effector paths are data sets: name -> (data set of places.py, its files).
ARMS: Mapping[str, tuple[str, str]] = {
    "arm_panda": ("robosuite", "*_Panda.npz"),
    "arm_ur5e": ("robosuite", "*_UR5e.npz"),
    "arm_iiwa": ("robosuite", "*_IIWA.npz"),
    "arm_kinova3": ("robosuite", "*_Kinova3.npz"),
    "arm_xarm7": ("robosuite", "*_XArm7.npz"),
    "arm_libero": ("libero", "*.npz"),
}
# Recorded with images: what `actok teacher` learns from.
IMAGES: Mapping[str, str] = {"metaworld_img64": "sim/metaworld_img64", "robosuite_img64": "sim/robosuite_img64"}
# Of a batch of the union. The arms' paths stand in the place of robosuite's commands, which are the same for all of them.
UNION: Mapping[str, int] = {
    **{name: ratio for name, ratio in RATIOS.items() if name != "robosuite"},
    **dict.fromkeys(ARMS, 5),
}
# Those left out in turn. Not the Unitree G1, the Adroit hand and the two-armed Panda of the handover: they have channels
# that no other robot has, so `adapt` refuses them.
LEFT_OUT = (
    "arm_ur5e",
    "aloha_sim",
    "metaworld",
    "arm_panda",
    "libero",
    "bridge_widowx",
    "arm_libero",
    "arm_iiwa",
    "robosuite_human_lift",
    "arm_kinova3",
    "arm_xarm7",
)
# Objectives that are changed or switched off, over the preset's.
NONE: Mapping[str, Any] = {"masking": 0, "contrast": 0, "prediction": 0}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "no-masking": {"masking": 0},
    "no-alignment": {"contrast": 0},
    "no-prediction": {"prediction": 0},
    "masking-actions": {"masking_target": "actions"},
    "plain-rvq": NONE,
}
# Variants of the codec instead, with all objectives.
SETTINGS: Mapping[str, Mapping[str, Any]] = {"relative-frames": {"frame": "relative"}}
X, FASTERVQ = "xtokenizer-tiny", "fastervq-tiny"
# As many tokens and bits a chunk of 20 steps as xtokenizer-tiny: 4 levels x 5 latents of 512 codes.
MATCHED = {"latent_parts": 5, "block": 5, "quantizer": {"levels": 4, "codes": 512}}

__all__ = [
    "ABLATION",
    "ABLATION_STEPS",
    "ARMS",
    "IMAGES",
    "LEFT_OUT",
    "NONE",
    "SEEDS",
    "SEMANTIC_JOBS",
    "UNION",
    "VARIANTS",
    "SemanticJob",
    "Workshop",
    "X",
    "extract_features",
    "make_arms",
    "train_semantic",
]


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Places and teacher of one making of the semantic results.

    Attributes:
        places: folders and data.
        teacher: of `actok features`.
    """

    places: Places
    teacher: str

    @property
    def root(self) -> Path:
        """Work files."""
        return self.places.trained.parent / "semantic"

    @property
    def pages(self) -> Path:
        """The generated pages."""
        return self.places.pages / "semantic" if self.places.scale == 1 else self.root / "pages"

    @cached_property
    def teacher_identity(self) -> dict[str, Any]:
        """Name of the teacher, and of a local one its files' names and sizes."""
        folder = Path(self.teacher)
        if not folder.exists():
            return {"name": self.teacher}
        return Source(name=folder.resolve().name, path=str(folder.resolve())).identity()

    @property
    def features(self) -> Path:
        """Where the teacher's features are; those of another teacher have a folder of their own."""
        digest = sha256(json.dumps(self.teacher_identity).encode()).hexdigest()[:8]
        return self.root / f"features-{digest}"

    @property
    def sources(self) -> dict[str, Source]:
        """Data sets by name, those that are made of achieved paths included."""
        found = dict(self.places.sources)
        arms = {name: Source(name=name, path=str(self.root / "arms" / name)) for name in ARMS if ARMS[name][0] in found}
        return found | arms | self.images

    @property
    def images(self) -> dict[str, Source]:
        """Data sets with images that are at hand, by name."""
        root = self.places.data_root
        paths = {} if root is None else {name: root / path for name, path in IMAGES.items()}
        return {name: Source(name=name, path=str(path)) for name, path in paths.items() if path.exists()}

    def folder(self, name: str) -> Path:
        """Of a job."""
        return self.root / "trained" / name

    def tokenizer(self, name: str) -> Path:
        """What a job trained. The folder has the job's name, by which the benchmark calls it."""
        return self.folder(name) / name


@dataclass(frozen=True, kw_only=True)
class SemanticJob(Job):
    """A tokenizer to train, perhaps on semantic objectives.

    Attributes:
        steps: of gradient descent.
        features: whether a teacher's features are read.
        align: objectives over the preset's (`--align`).
    """

    steps: int
    features: bool = False
    align: Mapping[str, Any] = field(default_factory=dict)

    def drawn(self, work: Workshop) -> list[Source] | None:
        """The data it is trained on; None where some of them are not at hand."""
        found = work.sources
        if any(name not in found for name in (*self.only, *self.without)):
            return None
        return [s for n, s in found.items() if n in (self.only or UNION) and n not in self.without]


def _ablation(variant: str, seed: int) -> SemanticJob:
    align = VARIANTS.get(variant, {})
    return SemanticJob(
        name=f"{variant}-{seed}",
        preset=X,
        part="ablation",
        settings=SETTINGS.get(variant, {}),
        only=(METAWORLD,),
        training={"seed": seed},
        steps=ABLATION_STEPS,
        features=align is not NONE,
        align=align,
    )


def _fastervq(name: str, seed: int, *, features: bool) -> SemanticJob:
    return SemanticJob(
        name=f"{name}-{seed}",
        preset=FASTERVQ,
        part="ablation",
        settings=MATCHED,
        only=(METAWORLD,),
        training={"seed": seed},
        steps=ABLATION_STEPS,
        features=features,
    )


def _union(name: str, **other: Any) -> SemanticJob:
    values = {"preset": X, "part": "union", "steps": UNION_STEPS, "features": True, **other}
    return SemanticJob(name=name, **values)


# The longest first, so that two at a time end together.
SEMANTIC_JOBS: Mapping[str, SemanticJob] = {
    job.name: job
    for job in (
        _union("union"),
        _union("union-plain-rvq", features=False, align=NONE),
        _union("union-fastervq", preset=FASTERVQ, settings=MATCHED, features=False),
        *(_union(f"without-{name}", part="left_out", without=(name,)) for name in LEFT_OUT),
        *(_ablation(variant, seed) for seed in SEEDS for variant in (*VARIANTS, *SETTINGS)),
        *(_fastervq("fastervq", seed, features=False) for seed in SEEDS),
        *(_fastervq("fastervq-aligned", seed, features=True) for seed in SEEDS),
        *(_union(f"alone-{name}", part="alone", only=(name,), steps=ALONE_STEPS) for name in UNION),
    )
}
ABLATION = (*VARIANTS, *SETTINGS, "fastervq", "fastervq-aligned")


# -- data and features ------------------------------------------------------------------------------------------------


def make_arms(work: Workshop, say: Callable[[str], None] = print) -> None:
    """Achieved end-effector paths as LeRobot folders, one an arm, from the recordings at hand."""
    for name, (dataset, pattern) in ARMS.items():
        if dataset not in work.places.sources:
            say(f"{name}: left out, {dataset} is not at hand")
            continue
        assert work.places.data_root is not None, "other data than Meta-World lie below it"
        recorded = work.places.data_root / OTHERS[dataset][0]
        folder = work.root / "arms" / name
        made_from = {
            "data": Source(name=name, path=str(recorded)).identity(),
            "code": module_hash("actok.evaluation.achieved"),
        }
        note = work.root / "arms" / f"{name}.json"
        if folder.exists() and note.exists() and json.loads(note.read_text()) == made_from:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        parts = [open_dataset(path) for path in sorted(recorded.glob(pattern))]
        paths = achieved_poses(parts, name, frame="delta")
        write_lerobot(paths, folder, space=paths.space, images=None)
        write_bytes(note, json.dumps(made_from, indent=1) + "\n")
        say(f"{name}: {len(paths)} episodes, {paths.lengths.sum()} frames of achieved paths")


def extract_features(
    work: Workshop,
    *,
    jobs: int,
    chosen: Mapping[str, SemanticJob] = SEMANTIC_JOBS,
    say: Callable[[str], None] = print,
) -> list[str]:
    """`actok features` of every data set that a job reads features of; it goes on where it stopped. Names what failed."""
    wanted = {s.name: s for job in chosen.values() if job.features for s in job.drawn(work) or []}
    tasks = []
    for source in wanted.values():
        if _extracted(source, work):
            say(f"features of {source.name}: kept")
            continue
        command = [sys.executable, "-m", "actok", "features", "--data", source.path, "--teacher", work.teacher]
        command += ["--out", str(work.features), *(["--space", source.space] if source.space else [])]
        folder = work.root / "extracted" / source.name
        spec = {"data": source.identity(), "teacher": work.teacher_identity}
        tasks.append(
            Task(name=source.name, folder=folder, spec=spec, files={}, command=command, said="features of its frames")
        )
    return [f"features of {name}" for name in run_tasks(tasks, work.places, jobs=jobs, say=say)]


def _extracted(source: Source, work: Workshop) -> bool:
    try:
        open_features(work.features, open_dataset(source.path, space=source.space), None)
    except DataError:
        return False
    return True


# -- training ---------------------------------------------------------------------------------------------------------


def specification(job: SemanticJob, work: Workshop) -> dict[str, Any] | None:
    """Everything that a job's outcome is asked to depend on; None where its data are not at hand."""
    sources = job.drawn(work)
    if not sources:
        return None
    settings, training = job.resolved(max(2, round(job.steps * work.places.scale)))
    found: dict[str, Any] = json.loads(
        json.dumps(
            {
                "preset": job.preset,
                "settings": settings,
                "training": training,
                "alignment": {**find_preset(job.preset).alignment, **job.align},
                "features": work.teacher_identity if job.features else None,
                "horizon": HORIZON,
                "seed": SEED,
                "data": [{**s.identity(), "ratio": UNION.get(s.name, 1)} for s in sources],
            }
        )
    )
    return found


def finished(job: SemanticJob, work: Workshop) -> bool:
    """Whether the job is done, as it is asked for now."""
    done = (work.tokenizer(job.name) / "config.json").exists()
    return done and kept_specification(work.folder(job.name)) == specification(job, work)


def command(job: SemanticJob, work: Workshop, spec: Mapping[str, Any]) -> list[str]:
    """The command line that trains a job; it also goes on with a run that stopped."""
    sources = job.drawn(work)
    assert sources, "asked for jobs whose data are at hand"
    folder = work.folder(job.name)
    preset = find_preset(job.preset)
    changed = {k: v for k, v in spec["training"].items() if preset.training.get(k) != v}
    one = sources[0] if len(sources) == 1 else None
    text = [
        sys.executable,
        "-m",
        "actok",
        "fit",
        job.preset,
        "--data",
        one.path if one else str(folder / "mixture.toml"),
    ]
    text += ["--space", one.space] if one and one.space else []
    text += ["--horizon", str(spec["horizon"]), "--seed", str(spec["seed"]), "--out", str(work.tokenizer(job.name))]
    text += ["--run", str(folder / "run"), "--resume", "--train", *assignments(changed)]
    text += ["--set", *assignments(job.settings)] if job.settings else []
    text += ["--features", str(work.features)] if job.features else []
    return text + (["--align", *assignments(job.align)] if job.align else [])


def _mixture(job: SemanticJob, work: Workshop) -> dict[str, str]:
    """The mixture file of a job of several data sets."""
    sources = job.drawn(work) or []
    return {"mixture.toml": mixture(sources, UNION)} if len(sources) > 1 else {}


def train_semantic(
    work: Workshop,
    *,
    jobs: int,
    chosen: Mapping[str, SemanticJob] = SEMANTIC_JOBS,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Train the jobs, some at a time on one thread each; those that failed are returned and may be tried again."""
    tasks = []
    for name, job in chosen.items():
        spec = specification(job, work)
        if spec is None:
            say(f"{name}: left out, its data are not at hand")
        elif finished(job, work):
            say(f"{name}: kept")
        else:
            tasks.append(
                Task(
                    name=name,
                    folder=work.folder(name),
                    spec=spec,
                    files=_mixture(job, work),
                    command=command(job, work, spec),
                    said=f"{spec['training']['steps']} steps, log {work.folder(name) / 'log.txt'}",
                )
            )
    return run_tasks(tasks, work.places, jobs=jobs, say=say)


def trained(work: Workshop, parts: Sequence[str], chosen: Mapping[str, SemanticJob] = SEMANTIC_JOBS) -> list[str]:
    """Names of the finished jobs of these parts."""
    return [name for name, job in chosen.items() if job.part in parts and finished(job, work)]
