"""Pictures of episodes that ran without a camera: the same actions again, in an environment that renders.

Physics is exact, so what is seen is what happened; where it is not (the outcome differs), the picture says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from actok.core import ConfigError, DataError
from actok.core.files import atomic_path
from actok.envs import Env
from actok.evaluation.trials import Trial
from actok.evaluation.workers import Workers

# Of a contact sheet: pictures, how many a row, and the height of the caption of each.
PICTURES, ROW, CAPTION = 8, 4, 16
SIZE = 224  # pixels; even, as video codecs want it
FRAMES_A_SECOND = 30  # at most; fewer pictures cost less to render

__all__ = ["check_filming", "contact_sheet", "film", "film_some", "write_video"]


def check_filming(env: Env, out: str | Path | None) -> None:
    """Raise ConfigError where there is no folder for pictures, or the environment has no camera."""
    if out is None:
        raise ConfigError(
            "episodes are to be filmed, but there is no folder for the pictures; give out, or 0 for record"
        )
    if not env.default_views:
        raise ConfigError(f"environment {env.name!r} names no default_views to film with; give 0 for record")


def film_some(
    env: Env, trials: Sequence[Trial], count: int, folder: Path, *, workers: int = 2, size: int = SIZE
) -> list[dict[str, Any]]:
    """Film `count` of these episodes, successes and failures in turn, tasks in turn, as far as there are any.

    For each a contact sheet (PNG) and, where PyAV is installed, a video (MP4) in `folder`, rendered in processes of
    their own (in a script they need the guard `if __name__ == "__main__":`), by the environment that
    `env.with_views` makes. Returns JSON values:
    [{task, number, success, steps, view, sheet, video (None without PyAV), reproduced}], files by name.
    """
    view = env.default_views[0]
    camera = env.with_views((view,), size)
    stride = max(1, math.ceil(env.rate_hz / FRAMES_A_SECOND))
    chosen = _choose(trials, count)
    found = []
    # Never in this process: MuJoCo decides when it is first imported whether it can render, and it may be here already.
    with Workers(camera, max(2, min(workers, len(chosen)))) as pool:
        jobs = [_Job(trial=trial, view=view, every=stride) for trial in chosen]
        for trial, (frames, steps, solved) in zip(chosen, pool.map(_film, jobs), strict=True):
            reproduced = solved == trial.success
            if not reproduced:
                warnings.warn(
                    f"episode {trial.number} of {trial.task} went differently when it was filmed; its physics depends on"
                    " more than start state and actions",
                    stacklevel=2,
                )
            name = f"{trial.task}-{trial.number}-{'success' if trial.success else 'failure'}"
            outcome = _outcome(trial) + ("" if reproduced else " (NOT REPRODUCED)")
            sheet = contact_sheet(frames, steps, trial.instruction, outcome)
            with atomic_path(folder / f"{name}.png") as path:
                sheet.save(path, format="PNG")
            video = None
            if find_spec("av") is not None:
                video = f"{name}.mp4"
                write_video(folder / video, frames, env.rate_hz / stride)
            found.append(
                {
                    "task": trial.task,
                    "number": trial.number,
                    "success": trial.success,
                    "steps": trial.steps,
                    "view": view,
                    "sheet": f"{name}.png",
                    "video": video,
                    "reproduced": reproduced,
                }
            )
    return found


def film(camera: Env, trial: Trial, view: str, *, every: int = 1) -> tuple[np.ndarray, np.ndarray, bool]:
    """Execute an episode's actions again: frames uint8 [F, H, W, 3], their steps int64 [F], and whether it is solved.

    A frame before the first step, after every `every`-th one and after the last. Raises DataError without images.
    """
    start = trial.start
    if start.state is not None:
        observation = camera.restore(start.task, start.state)
    else:
        assert start.seed is not None, "Start has checked it"
        observation = camera.reset(start.task, seed=start.seed)
    if view not in observation.images:
        raise DataError(
            f"environment {camera.name!r} shows no view {view!r} (it shows {', '.join(observation.images) or 'none'});"
            " name in default_views what it can show"
        )
    frames, steps = [observation.images[view]], [0]
    solved = False
    for step, action in enumerate(trial.actions, start=1):
        if step % every == 0 or step == trial.steps:
            frames.append(camera.step(action).images[view])
            steps.append(step)
        else:
            camera.advance(action)
        solved = solved or camera.success
    return np.stack(frames), np.array(steps), solved


def contact_sheet(frames: np.ndarray, steps: np.ndarray, title: str, outcome: str) -> Any:
    """A PIL image: frames at equal intervals, first and last among them, each with its step; what came of it below."""
    from PIL import Image, ImageDraw

    chosen = np.unique(np.linspace(0, len(frames) - 1, PICTURES).round().astype(int))
    height, width = frames.shape[1:3]
    columns = min(ROW, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    cell = height + CAPTION
    sheet = Image.new("RGB", (columns * width, rows * cell + 2 * CAPTION), "white")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen):
        x, y = width * (place % columns), cell * (place // columns)
        sheet.paste(Image.fromarray(frames[index]), (x, y))
        draw.text((x + 4, y + height + 2), f"step {steps[index]}", fill="black")
    draw.text((4, rows * cell + 2), title, fill="black")
    draw.text((4, rows * cell + CAPTION + 2), outcome, fill="black")
    return sheet


def write_video(path: Path, frames: np.ndarray, rate_hz: float) -> Path:
    """Frames uint8 [F, H, W, 3] as H.264 in MP4 at that rate (or MPEG-4 where PyAV lacks x264), atomically.

    The codecs want even sizes: where H or W is odd, the last row or column is there twice.
    """
    import av

    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(rate_hz).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    trial: Trial
    view: str
    every: int


def _film(camera: Env, job: _Job) -> tuple[np.ndarray, np.ndarray, bool]:
    return film(camera, job.trial, job.view, every=job.every)


def _outcome(trial: Trial) -> str:
    if trial.success:
        return f"success at step {trial.steps}"
    if trial.invalid is not None:
        return f"failure at step {trial.steps}: a chunk was not valid ({trial.invalid})"
    return f"failure: not solved in {trial.steps} steps"


def _choose(trials: Sequence[Trial], count: int) -> list[Trial]:
    """Successes and failures in turn, and within each the tasks in turn."""
    queues = []
    for success in (True, False):
        mine = [trial for trial in trials if trial.success == success]
        seen: dict[str, int] = {}
        ranked = []
        for trial in mine:
            seen[trial.task] = seen.get(trial.task, 0) + 1
            ranked.append((seen[trial.task], trial))
        queues.append([trial for _, trial in sorted(ranked, key=lambda pair: pair[0])])
    chosen: list[Trial] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return chosen
