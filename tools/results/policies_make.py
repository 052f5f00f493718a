"""The steps of the policies' results: demonstrations, tokenizers, policies, rollouts, latency. See policies.py."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from actok.core import DataError
from actok.core.files import write_bytes
from actok.data import open_dataset
from actok.training.semantic import open_features
from results import policies
from results.places import ROOT, SEED
from results.policies import HORIZON, TOKENIZERS, PolicyJob, Suite, TokenizerJob
from results.policies_asked import ACTOK, Studio, tokenizer_identity
from results.training import Task, kept_specification, run_tasks

Say = Callable[[str], None]
# Exit code of `actok collect` where a task has fewer episodes, and of `actok rollout` where a chunk was not valid: what is
# written counts both.
SHORT = (0, 3)
LATENCY = ROOT / "benchmarks" / "policy_latency.py"

__all__ = ["bench", "collect", "film", "fit_tokenizers", "groups", "latency", "roll_out", "train_policies"]


def suites_of(chosen: Mapping[str, PolicyJob]) -> list[Suite]:
    """Of the jobs, in the order of the table."""
    return [suite for suite in policies.SUITES.values() if any(job.suite == suite.name for job in chosen.values())]


def groups(chosen: Mapping[str, PolicyJob]) -> list[dict[str, PolicyJob]]:
    """Jobs that are compared with each other: trained and rolled out before the next ones, so that pages come early."""
    return [
        {job.name: job for job in part}
        for _, part in groupby(chosen.values(), key=lambda job: (job.suite, job.parts[0], job.seed))
    ]


# -- demonstrations ---------------------------------------------------------------------------------------------------


def collect(studio: Studio, chosen: Mapping[str, PolicyJob], *, jobs: int, say: Say = print) -> list[str]:
    """`actok collect` of each suite; those that failed. Demonstrations that were recorded elsewhere by the same command are
    taken as they are, where the folder holds all tasks with as many episodes.
    """
    tasks = []
    for suite in suites_of(chosen):
        folder = studio.root / "collected" / suite.data
        out = Path(studio.data(suite).path)
        spec = {
            "env": suite.env,
            "tasks": list(suite.tasks),
            "episodes": studio.demonstrations(suite),
            "seed": SEED,
        }
        kept = kept_specification(folder)
        if out.exists() and (kept == spec or (kept is None and _holds(out, spec))):
            write_bytes(folder / "spec.json", json.dumps(spec, indent=1) + "\n")
            say(f"demonstrations of {suite.name}: kept")
            continue
        if out.exists() and kept is None:
            raise DataError(f"{out} holds other demonstrations than are asked for ({spec}); move it away")
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [*ACTOK, "collect", "--env", suite.env, "--tasks", ",".join(suite.tasks), "--seed", str(SEED)]
        command += ["--episodes", str(spec["episodes"]), "--workers", "1", "--out", str(out)]
        tasks.append(
            Task(
                name=f"demonstrations of {suite.name}",
                folder=folder,
                spec=spec,
                files={},
                command=command,
                said=f"{spec['episodes']} episodes of {len(suite.tasks)} tasks",
                accepted=SHORT,
            )
        )
    return run_tasks(tasks, studio.places, jobs=jobs, say=say)


def _holds(folder: Path, spec: Mapping[str, Any]) -> bool:
    """Whether a data set has the tasks and episodes that are asked for."""
    found = Counter(open_dataset(str(folder)).tasks or ())
    return found == dict.fromkeys(spec["tasks"], spec["episodes"])


# -- tokenizers -------------------------------------------------------------------------------------------------------


def fit_tokenizers(studio: Studio, chosen: Mapping[str, PolicyJob], *, jobs: int, say: Say = print) -> list[str]:
    """A teacher's features where they are read, then every tokenizer that the jobs act through; what failed is named."""
    wanted: dict[tuple[str, str], tuple[Suite, TokenizerJob]] = {}
    for job in chosen.values():
        wanted[job.suite, job.tokenizer] = (policies.SUITES[job.suite], TOKENIZERS[job.tokenizer])
    tasks = []
    reading = []
    for suite, job in wanted.values():
        label = f"{job.name} of {suite.name}"
        if not Path(studio.data(suite).path).exists():
            say(f"{label}: left out, there are no demonstrations")
            continue
        if job.features and studio.teacher is None:
            say(f"{label}: left out, give --teacher")
            continue
        spec = studio.tokenizer_specification(suite, job)
        if _kept_tokenizer(studio, suite, job, spec):
            say(f"{label}: kept")
            continue
        if job.features:
            reading.append(suite)
        tasks.append(
            Task(
                name=label,
                folder=studio.tokenizer_job(suite, job.name),
                spec=spec,
                files={},
                command=studio.tokenizer_command(suite, job, spec),
                said=f"{spec['training']['steps']} steps" if job.steps is not None else "closed-form",
            )
        )
    failed = _extract(studio, reading, jobs=jobs, say=say)
    return failed + run_tasks(tasks, studio.places, jobs=jobs, say=say)


def _extract(studio: Studio, suites: Sequence[Suite], *, jobs: int, say: Say) -> list[str]:
    tasks = []
    for suite in suites:
        data = studio.data(suite)
        try:
            open_features(studio.features, open_dataset(data.path), None)
        except DataError:
            command = [*ACTOK, "features", "--data", data.path, "--teacher", str(studio.teacher)]
            tasks.append(
                Task(
                    name=f"features of {suite.name}",
                    folder=studio.root / "extracted" / suite.name,
                    spec={"data": data.identity(), "teacher": studio.teacher_identity},
                    files={},
                    command=[*command, "--out", str(studio.features)],
                    said="of its frames",
                )
            )
    return run_tasks(tasks, studio.places, jobs=jobs, say=say)


def _kept_tokenizer(studio: Studio, suite: Suite, job: TokenizerJob, spec: Mapping[str, Any]) -> bool:
    """Whether the tokenizer is there as it is asked for.

    One that was trained elsewhere by the same command is adopted: its folder put in its place, and its run.json beside it
    in run/. What that says of preset, settings, training, objectives and data has to agree.
    """
    folder = studio.tokenizer_job(suite, job.name)
    if tokenizer_identity(studio.tokenizer(suite, job.name)) is None:
        return False
    kept = kept_specification(folder)
    if kept is not None or job.steps is None:
        return kept == spec
    try:
        ran = json.loads((folder / "run" / "run.json").read_bytes())["identity"]
    except OSError:
        return False
    if not _agrees(ran, spec, job, len(open_dataset(studio.data(suite).path))):
        return False
    write_bytes(folder / "spec.json", json.dumps(spec, indent=1) + "\n")
    return True


def _agrees(ran: Mapping[str, Any], spec: Mapping[str, Any], job: TokenizerJob, episodes: int) -> bool:
    """Whether a run's identity is what a specification asks for; how often it logged and how often it was judged aside."""
    aside = ("log_every", "eval_every", "eval_chunks", "checkpoint_every")
    asked = {k: v for k, v in spec["training"].items() if k not in aside}
    data = ran["data"][0]
    return (
        ran["tokenizer"] == spec["preset"]
        and _within(spec["settings"], ran["settings"])
        and _within(asked, ran["training"])
        and _teacher(ran.get("alignment")) == (Path(spec["features"]["name"]).name if job.features else None)
        and (not ran.get("alignment") or _within(spec["alignment"], ran["alignment"]))
        and len(ran["data"]) == 1
        and (data["name"], data["episodes"], data["horizon"]) == (spec["data"]["name"], episodes, HORIZON)
        and data["split"]["seed"] == SEED
    )


def _teacher(alignment: Mapping[str, Any] | None) -> str | None:
    """Name of the foundation model whose features a run read, None where it read none."""
    if not alignment or not alignment["features"]:
        return None
    return Path(alignment["teachers"][0]["model"]).name


def _within(asked: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    return all(
        _within(value, found[key]) if isinstance(value, dict) else key in found and found[key] == value
        for key, value in asked.items()
        if key in found or value
    )


def bench(studio: Studio, *, jobs: int, say: Say = print) -> list[str]:
    """`actok bench` of every tokenizer that is there, on the held-out episodes of its suite."""
    tasks = []
    for suite in policies.SUITES.values():
        folders = [studio.tokenizer(suite, name) for name in TOKENIZERS]
        there = {folder.name: weights for folder in folders if (weights := tokenizer_identity(folder)) is not None}
        if not there:
            continue
        spec = {"data": studio.data(suite).identity(), "tokenizers": there, "seed": SEED, "horizon": HORIZON}
        folder, out = studio.root / "judged" / suite.name, studio.root / "bench" / suite.name
        if kept_specification(folder) == spec and (out / "results.json").exists():
            say(f"errors of {suite.name}: kept")
            continue
        names = ",".join(str(studio.tokenizer(suite, name)) for name in there)
        command = [*ACTOK, "bench", "--data", studio.data(suite).path, "--tokenizers", names, "--out", str(out)]
        command += ["--horizon", str(HORIZON), "--seed", str(SEED)]
        tasks.append(
            Task(
                name=f"errors of {suite.name}",
                folder=folder,
                spec=spec,
                files={},
                command=command,
                said=f"{len(there)} tokenizers",
            )
        )
    return run_tasks(tasks, studio.places, jobs=jobs, say=say)


# -- policies ---------------------------------------------------------------------------------------------------------


def train_policies(studio: Studio, chosen: Mapping[str, PolicyJob], *, jobs: int, say: Say = print) -> list[str]:
    """Train the policies, some at a time on one thread each; those that failed may be tried again."""
    tasks = []
    for name, job in chosen.items():
        spec = studio.policy_specification(job)
        if spec is None:
            say(f"{name}: left out, there is no tokenizer {job.tokenizer}")
        elif kept_specification(studio.policy_job(job)) == spec and (studio.policy(job) / "config.json").exists():
            say(f"{name}: kept")
        else:
            tasks.append(
                Task(
                    name=name,
                    folder=studio.policy_job(job),
                    spec=spec,
                    files={},
                    command=studio.policy_command(job, spec),
                    said=f"{spec['training']['steps']} steps, log {studio.policy_job(job) / 'log.txt'}",
                )
            )
    return run_tasks(tasks, studio.places, jobs=jobs, say=say)


def roll_out(studio: Studio, chosen: Mapping[str, PolicyJob], *, jobs: int, say: Say = print) -> list[str]:
    """Roll every trained policy out, with each of its heads; what failed is named."""
    tasks = []
    for job in chosen.values():
        for head in job.heads:
            folder = studio.rolled(job, head)
            spec = studio.rollout_specification(job, head)
            if spec is None:
                say(f"{folder.name}: left out, it is not trained")
            elif kept_specification(folder) == spec and (folder / "rollout.json").exists():
                say(f"{folder.name}: kept")
            else:
                tasks.append(
                    Task(
                        name=folder.name,
                        folder=folder,
                        spec=spec,
                        files={},
                        command=studio.rollout_command(job, head, spec),
                        said=f"{spec['episodes']} episodes of {len(spec['tasks'])} tasks",
                        accepted=SHORT,
                    )
                )
    return run_tasks(tasks, studio.places, jobs=jobs, say=say)


def film(studio: Studio, chosen: Mapping[str, PolicyJob], *, jobs: int, say: Say = print) -> list[str]:
    """Contact sheets of a success and a failure of each suite; what failed is named."""
    tasks = []
    for suite in suites_of(chosen):
        spec, folder = studio.film_specification(suite), studio.filmed(suite)
        if spec is None:
            say(f"pictures of {suite.name}: left out, the policy of {suite.filmed[0]} is not trained")
            continue
        if kept_specification(folder) == spec and (folder / "rollout.json").exists():
            say(f"pictures of {suite.name}: kept")
            continue
        tasks.append(
            Task(
                name=f"pictures of {suite.name}",
                folder=folder,
                spec=spec,
                files={},
                command=studio.film_command(suite, spec),
                said=f"two of {spec['episodes']} episodes of {len(spec['tasks'])} tasks",
                accepted=SHORT,
            )
        )
    return run_tasks(tasks, studio.places, jobs=jobs, say=say)


def latency(studio: Studio, chosen: Mapping[str, PolicyJob], *, say: Say = print) -> list[str]:
    """The stages of the first seed's policies, one process alone."""
    tasks = []
    for suite in suites_of(chosen):
        there = {
            job.variant: (job, spec["policy"])
            for job in chosen.values()
            if job.suite == suite.name and job.seed == min(j.seed for j in chosen.values())
            if (spec := studio.rollout_specification(job, job.heads[0])) is not None
        }
        if not there:
            continue
        folder = studio.root / "latency" / suite.name
        spec = {"policies": {variant: identity for variant, (_, identity) in there.items()}}
        if kept_specification(folder) == spec and (folder / "latency.json").exists():
            say(f"latency of {suite.name}: kept")
            continue
        command = [
            sys.executable,
            str(LATENCY),
            "--data",
            studio.data(suite).path,
            "--out",
            str(folder / "latency.json"),
        ]
        command += ["--policies", *(f"{variant}={studio.policy(job)}" for variant, (job, _) in there.items())]
        tasks.append(
            Task(
                name=f"latency of {suite.name}",
                folder=folder,
                spec=spec,
                files={},
                command=command,
                said=f"{len(there)} policies",
            )
        )
    return run_tasks(tasks, studio.places, jobs=1, say=say)
