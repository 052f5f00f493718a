"""Train every job by `actok fit` in processes of its own: resumable, and nothing is trained twice.

The folder of a job holds spec.json (everything that was asked for), run (log and checkpoints), tokenizer (the result),
log.txt (what the command said) and, where it failed, failure.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actok.core import build_config, find_preset
from actok.core.files import write_bytes
from actok.core.provenance import circumstances
from actok.core.registry import load_target
from results.jobs import HORIZON, JOBS, STEPS, Job, calibrated_steps
from results.places import RATIOS, ROOT, SEED, Places, Source, portable

POLL_S = 0.5
# Steps that are timed in calibration, after some that are not.
TIMED, UNTIMED = 12, 4
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

__all__ = [
    "ONE_THREAD",
    "Task",
    "assignments",
    "calibrate",
    "finished",
    "kept_specification",
    "mixture",
    "run_tasks",
    "specification",
    "tokenizer_folder",
    "train",
]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A command that makes what is in one folder.

    Attributes:
        name: for messages.
        folder: where spec.json, log.txt and failure.json go; emptied before, where it holds something else.
        spec: everything that was asked for, kept in spec.json.
        files: to write into the folder before, by name.
        command: the command line.
        said: what is said when it starts.
        accepted: exit codes of a command that made what was asked for.
    """

    name: str
    folder: Path
    spec: Mapping[str, Any]
    files: Mapping[str, str]
    command: Sequence[str]
    said: str
    accepted: Sequence[int] = (0,)


@dataclass(kw_only=True, eq=False)
class _Running:
    """A task that is being done."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    since: float
    accepted: Sequence[int]


def tokenizer_folder(places: Places, name: str) -> Path:
    """Where the trained tokenizer of a job is."""
    return places.trained / name / "tokenizer"


def specification(job: Job, places: Places) -> dict[str, Any] | None:
    """Everything that a job's outcome is asked to depend on; None where its data are not at hand."""
    sources = job.sources(places)
    if sources is None:
        return None
    settings, training = job.resolved(calibrated_steps(job, places.scale))
    spec = {
        "preset": job.preset,
        "settings": settings,
        "training": training,
        "horizon": HORIZON,
        "seed": SEED,
        "data": [{**s.identity(), "ratio": RATIOS[s.name]} for s in sources],
    }
    found: dict[str, Any] = json.loads(json.dumps(spec))
    return found


def finished(job: Job, places: Places) -> bool:
    """Whether the job is done, as it is asked for now."""
    folder = places.trained / job.name
    return (folder / "tokenizer" / "config.json").exists() and kept_specification(folder) == specification(job, places)


def kept_specification(folder: Path) -> dict[str, Any] | None:
    """What was asked for when a folder was made, None where nothing was."""
    try:
        found = json.loads((folder / "spec.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def command(job: Job, places: Places, spec: Mapping[str, Any]) -> list[str]:
    """The command line that trains a job; it also goes on with a run that stopped."""
    sources = job.sources(places)
    assert sources, "asked for jobs whose data are at hand"
    folder = places.trained / job.name
    preset = find_preset(job.preset)
    changed = {k: v for k, v in spec["training"].items() if preset.training.get(k) != v}
    data = sources[0].path if len(sources) == 1 else str(folder / "mixture.toml")
    text = [sys.executable, "-m", "actok", "fit", job.preset, "--data", data]
    text += ["--horizon", str(spec["horizon"]), "--seed", str(spec["seed"]), "--out", str(folder / "tokenizer")]
    text += ["--run", str(folder / "run"), "--resume", "--train", *assignments(changed)]
    return text + (["--set", *assignments(job.settings)] if job.settings else [])


def mixture(sources: Sequence[Source], ratios: Mapping[str, int] = RATIOS) -> str:
    """A mixture file of data sets with their ratios."""
    text = ""
    for s in sources:
        values = {"name": s.name, "source": s.path, "ratio": ratios[s.name], **({"space": s.space} if s.space else {})}
        text += "[[datasets]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    return text


def assignments(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """["quantizer.codes=512"] from {"quantizer": {"codes": 512}}, for --set, --train and --align; JSON's numbers, texts and
    lists are TOML's too.
    """
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += assignments(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={json.dumps(value)}")
    return found


def train(names: Sequence[str], places: Places, *, jobs: int, say: Callable[[str], None] = print) -> list[str]:
    """Train the named jobs, some at a time on one thread each; those that failed are returned and may be tried again.

    Ctrl-C and SIGTERM stop the processes after a step, with a checkpoint; the same command goes on.
    """
    waiting = []
    for name in names:
        spec = specification(JOBS[name], places)
        if spec is None:
            say(f"{name}: left out, its data are not at hand")
        elif finished(JOBS[name], places):
            say(f"{name}: kept")
        else:
            waiting.append(_task(name, spec, places))
    if waiting:
        meant = sum(JOBS[task.name].seconds for task in waiting) * places.scale / jobs
        say(f"{len(waiting)} jobs, meant to take {meant / 60:.0f} minutes")
    return run_tasks(waiting, places, jobs=jobs, say=say)


def _task(name: str, spec: Mapping[str, Any], places: Places) -> Task:
    folder = places.trained / name
    return Task(
        name=name,
        folder=folder,
        spec=spec,
        files={"mixture.toml": mixture(JOBS[name].sources(places) or [])},
        command=command(JOBS[name], places, spec),
        said=f"{spec['training']['steps']} steps, log {folder / 'log.txt'}",
    )


def run_tasks(tasks: Sequence[Task], places: Places, *, jobs: int, say: Callable[[str], None] = print) -> list[str]:
    """Do the tasks, some at a time on one thread each, in their order; the names of those that failed are returned."""
    waiting = list(tasks)
    running: list[_Running] = []
    failed: list[str] = []
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0), places, say))
            time.sleep(POLL_S)
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                if not _ended(one, say):
                    failed.append(one.name)
    finally:
        for one in running:
            one.process.send_signal(signal.SIGINT)
        for one in running:
            one.process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _start(task: Task, places: Places, say: Callable[[str], None]) -> _Running:
    folder = task.folder
    if kept_specification(folder) != task.spec:  # something else was made here
        shutil.rmtree(folder, ignore_errors=True)
    (folder / "failure.json").unlink(missing_ok=True)
    write_bytes(folder / "spec.json", json.dumps(task.spec, indent=1) + "\n")
    for name, text in task.files.items():
        write_bytes(folder / name, text)
    say(f"{task.name}: {task.said}")
    # The frames of a data set are read once, and mapped into memory by all.
    environment = {**os.environ, **ONE_THREAD, "ACTOK_CACHE": str(places.work / "cache")}
    # A session of its own: Ctrl-C reaches it once, through this process.
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(
            task.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
    return _Running(
        name=task.name, folder=folder, process=process, since=time.monotonic(), accepted=tuple(task.accepted)
    )


def _ended(one: _Running, say: Callable[[str], None]) -> bool:
    """Say how a task ended; True where it succeeded. A failure is recorded."""
    code, seconds = one.process.returncode, time.monotonic() - one.since
    if code in one.accepted:
        say(f"{one.name}: done in {seconds:.0f} s")
        return True
    last = (one.folder / "log.txt").read_text(errors="replace").splitlines()[-20:]
    write_bytes(one.folder / "failure.json", json.dumps({"exit_code": code, "log": last}, indent=1) + "\n")
    say(f"{one.name}: FAILED with exit code {code} after {seconds:.0f} s: {last[-1] if last else ''}")
    return False


# -- calibration ------------------------------------------------------------------------------------------------------


# What the other processes of a training do meanwhile: they share caches and memory with the one that is timed.
COMPANY = "import torch; torch.set_num_threads(1); a = torch.randn(512, 512)\nwhile True: a @ a"


@contextmanager
def _company(count: int) -> Iterator[None]:
    """So many busy processes beside this one."""
    environment = {**os.environ, **ONE_THREAD}
    others = [subprocess.Popen([sys.executable, "-c", COMPANY], env=environment) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def calibrate(names: Sequence[str], places: Places, *, jobs: int, say: Callable[[str], None] = print) -> None:
    """Time some steps of each job on one thread, beside `jobs` - 1 busy processes as in training, and keep how many fit in
    its seconds in steps.json. Processor time counts, so that what else runs on the machine matters little.
    """
    with _company(jobs - 1):
        _calibrate(names, places, say)


def _calibrate(names: Sequence[str], places: Places, say: Callable[[str], None]) -> None:
    import torch

    from actok.training.config import train_config
    from actok.training.engine import Trainer
    from actok.training.fitting import load_material
    from actok.training.sources import Source as Drawn

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # on dimensions that never change: said when it is trained
    materials = {
        n: load_material(s.path, space=s.space, horizon=HORIZON, seed=SEED, max_chunks=2_000)
        for n, s in places.sources.items()
    }
    kept = json.loads(STEPS.read_text())["jobs"] if STEPS.exists() else {}
    for name in names:
        job = JOBS[name]
        sources = job.sources(places)
        if job.pace is not None or sources is None:
            continue
        used = [materials[s.name] for s in sources]
        settings, training = job.resolved(UNTIMED + TIMED)
        training = {**training, "eval_every": 0, "quantise_after": 0}
        target = load_target(find_preset(job.preset).target)
        config = build_config(target.config_class, settings, name)
        tokenizer = target.prepare([m.train for m in used], config, seed=SEED)
        chunks = [Drawn.of_chunks(m.pool, m.train.space.embodiment) for m in used]
        seconds = []
        for steps in (UNTIMED, UNTIMED + TIMED):
            timed = train_config({}, {**training, "steps": steps}, name)
            trainer = Trainer(tokenizer, chunks, timed, ratios=[RATIOS[s.name] for s in sources], progress=False)
            begin = time.process_time()
            trainer.run()
            seconds.append(time.process_time() - begin)
        each = (seconds[1] - seconds[0]) / TIMED
        steps = max(1, _rounded(job.seconds / each))
        kept[name] = {"steps": steps, "seconds_per_step": round(each, 4), "seconds": job.seconds}
        say(f"{name}: {each:.4f} s a step, {steps} steps in {job.seconds:.0f} s")
        conditions = json.loads(portable(json.dumps(circumstances(("torch", "numpy"))), places.data_root))
        body = {"conditions": conditions, "jobs": {n: kept[n] for n in JOBS if n in kept}}
        write_bytes(STEPS, json.dumps(body, indent=1) + "\n")


def _rounded(steps: float) -> int:
    """Two significant digits."""
    return int(float(np.format_float_scientific(steps, precision=1)))
