"""What each policy, tokenizer and rollout of the results is asked to depend on, and the command that makes it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from actok.core import find_preset
from actok.policies.presets import find_policy_preset
from results import policies
from results.places import SEED, Places, Source
from results.policies import (
    BATCH,
    EXECUTE,
    HORIZON,
    LIMIT,
    POLICY_STEPS,
    PRESET,
    PolicyJob,
    Suite,
    TokenizerJob,
)
from results.training import assignments

ACTOK = (sys.executable, "-m", "actok")

__all__ = ["ACTOK", "Studio", "tokenizer_identity"]


@dataclass(frozen=True, kw_only=True)
class Studio:
    """Places and teacher of one making of the results of policies.

    Attributes:
        places: folders; a trial at a smaller scale has its own.
        teacher: of `actok features`; None: what is aligned is left out.
    """

    places: Places
    teacher: str | None = None

    @property
    def root(self) -> Path:
        """Work files."""
        return self.places.trained.parent / "policies"

    @property
    def pages(self) -> Path:
        """The generated pages."""
        return self.places.pages / "policies" if self.places.scale == 1 else self.root / "pages"

    def scaled(self, count: int, least: int) -> int:
        """Of a trial, at least `least`."""
        return max(least, round(count * self.places.scale)) if self.places.scale < 1 else count

    def demonstrations(self, suite: Suite) -> int:
        """Of each task. Fewer than ten would leave nothing to hold out."""
        return self.scaled(suite.demonstrations, 10)

    def data(self, suite: Suite) -> Source:
        """The demonstrations of a suite."""
        return Source(name=suite.data, path=str(self.root / "data" / suite.data))

    @cached_property
    def teacher_identity(self) -> dict[str, Any] | None:
        """Name of the teacher, and of a local one its files' names and sizes."""
        if self.teacher is None:
            return None
        folder = Path(self.teacher)
        if not folder.exists():
            return {"name": self.teacher}
        return Source(name=folder.resolve().name, path=str(folder.resolve())).identity()

    @property
    def features(self) -> Path:
        """Where the teacher's features are; those of another teacher have a folder of their own."""
        digest = sha256(json.dumps(self.teacher_identity).encode()).hexdigest()[:8]
        return self.root / f"features-{digest}"

    def tokenizer_job(self, suite: Suite, name: str) -> Path:
        """Folder of a tokenizer's job."""
        return self.root / "tokenizers" / suite.name / name

    def tokenizer(self, suite: Suite, name: str) -> Path:
        """What it made. The folder has the tokenizer's name, by which the benchmark calls it."""
        return self.tokenizer_job(suite, name) / name

    def policy_job(self, job: PolicyJob) -> Path:
        """Folder of a policy's training."""
        return self.root / "trained" / job.name

    def policy(self, job: PolicyJob) -> Path:
        """What it made."""
        return self.policy_job(job) / "policy"

    def rolled(self, job: PolicyJob, head: str) -> Path:
        """Folder of a rollout."""
        return self.root / "rollouts" / f"{job.name}-{head}"

    # -- what is asked for ----------------------------------------------------------------------------------------

    def tokenizer_specification(self, suite: Suite, job: TokenizerJob) -> dict[str, Any]:
        """Everything that a tokenizer is asked to depend on."""
        preset = find_preset(job.preset)
        spec: dict[str, Any] = {
            "preset": job.preset,
            "settings": dict(preset.settings),
            "horizon": HORIZON,
            "seed": SEED,
            "data": self.data(suite).identity(),
        }
        if job.steps is not None:
            steps = self.scaled(round(job.steps * suite.share), 2)
            training = {**preset.training, "steps": steps}
            if training.get("quantise_after", 0) >= steps:  # of a trial
                training["quantise_after"] = steps // 2
            spec |= {"training": training, "alignment": {**preset.alignment, **job.align}}
            spec["features"] = self.teacher_identity if job.features else None
        return _json(spec)

    def tokenizer_command(self, suite: Suite, job: TokenizerJob, spec: Mapping[str, Any]) -> list[str]:
        """The command line that fits a tokenizer; it also goes on with a run that stopped."""
        folder = self.tokenizer_job(suite, job.name)
        text = [*ACTOK, "fit", job.preset, "--data", self.data(suite).path, "--horizon", str(spec["horizon"])]
        text += ["--seed", str(spec["seed"]), "--out", str(self.tokenizer(suite, job.name))]
        if job.steps is None:
            return text
        before = find_preset(job.preset).training
        changed = {k: v for k, v in spec["training"].items() if before.get(k) != v}
        text += ["--run", str(folder / "run"), "--resume", "--train", *assignments(changed)]
        text += ["--features", str(self.features)] if job.features else []
        return text + (["--align", *assignments(job.align)] if job.align else [])

    def policy_specification(self, job: PolicyJob) -> dict[str, Any] | None:
        """Everything that a policy is asked to depend on; None where its tokenizer is not made."""
        suite = policies.SUITES[job.suite]
        identity = tokenizer_identity(self.tokenizer(suite, job.tokenizer))
        if identity is None:
            return None
        settings, training = job.resolved(self.scaled(POLICY_STEPS, 2))
        return _json(
            {
                "preset": PRESET,
                "settings": settings,
                "training": training,
                "tokenizer": {"name": job.tokenizer, "weights": identity},
                "seed": SEED,
                "data": self.data(suite).identity(),
            }
        )

    def policy_command(self, job: PolicyJob, spec: Mapping[str, Any]) -> list[str]:
        """The command line that trains a policy; it also goes on with a run that stopped."""
        suite = policies.SUITES[job.suite]
        preset = find_policy_preset(PRESET)
        changed = {k: v for k, v in spec["training"].items() if preset.training.get(k) != v}
        text = [*ACTOK, "train-policy", "--policy", PRESET, "--tokenizer", str(self.tokenizer(suite, job.tokenizer))]
        text += ["--data", self.data(suite).path, "--seed", str(spec["seed"]), "--out", str(self.policy(job))]
        text += ["--run", str(self.policy_job(job) / "run"), "--resume", "--train", *assignments(changed)]
        return text + (["--set", *assignments(job.settings)] if job.settings else [])

    def rollout_specification(self, job: PolicyJob, head: str) -> dict[str, Any] | None:
        """Everything that a rollout is asked to depend on; None where its policy is not trained."""
        suite = policies.SUITES[job.suite]
        try:
            files = json.loads((self.policy(job) / "config.json").read_bytes())["files"]
        except OSError:
            return None
        return _json(
            {
                "policy": sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
                "env": suite.env,
                "tasks": suite.tasks,
                "episodes": self.scaled(suite.episodes, 1),
                "seed": job.seed,
                "head": head,
                "execute": EXECUTE,
                "limit": LIMIT,
                "batch": BATCH,
            }
        )

    def rollout_command(self, job: PolicyJob, head: str, spec: Mapping[str, Any]) -> list[str]:
        """The command line of a rollout."""
        text = [
            *ACTOK,
            "rollout",
            "--policy",
            str(self.policy(job)),
            "--env",
            f"{spec['env']}/{','.join(spec['tasks'])}",
        ]
        for name in ("episodes", "seed", "head", "execute", "limit", "batch"):
            text += [f"--{name}", str(spec[name])]
        return [*text, "--workers", "1", "--record", "0", "--out", str(self.rolled(job, head))]

    def filmed(self, suite: Suite) -> Path:
        """Where the pictures of a suite's policy are."""
        return self.root / "filmed" / suite.name

    def film_specification(self, suite: Suite) -> dict[str, Any] | None:
        """A rollout's, of few episodes, and whose; None where the policy is not trained."""
        variant, episodes = suite.filmed
        spec = self.rollout_specification(self._filmed_job(suite), "tokens")
        return None if spec is None else {**spec, "variant": variant, "episodes": min(episodes, spec["episodes"])}

    def _filmed_job(self, suite: Suite) -> PolicyJob:
        return policies.POLICY_JOBS[f"{suite.name}-{suite.filmed[0]}-{policies.SEEDS[0]}"]

    def film_command(self, suite: Suite, spec: Mapping[str, Any]) -> list[str]:
        """The rollout again, of few episodes, two of which are filmed: a success and a failure where there are both."""
        text = self.rollout_command(self._filmed_job(suite), spec["head"], spec)
        return [*text[: text.index("--record")], "--record", "2", "--out", str(self.filmed(suite))]


def tokenizer_identity(folder: Path) -> str | None:
    """Hash of a saved tokenizer, None where there is none."""
    try:
        return str(json.loads((folder / "config.json").read_bytes())["weights_hash"])
    except OSError:
        return None


def _json(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it is after a round through JSON, so that it equals what was kept."""
    found: dict[str, Any] = json.loads(json.dumps(value))
    return found
