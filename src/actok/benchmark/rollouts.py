"""A saved policy in a named environment, as one step: load, roll out, write rollout.json and rollout.html, table."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from actok.benchmark.report import html_facts, html_page, html_table, made_under
from actok.benchmark.results import plain, provenance, write_results
from actok.benchmark.table import Column, number, percent, render_columns
from actok.core import ConfigError
from actok.core.files import write_bytes
from actok.envs import Env, make_env, option_names

__all__ = ["environment_for", "render_rollout", "roll_out", "rollout_columns", "rollout_text", "split_env"]


def split_env(text: str) -> tuple[str, list[str] | None]:
    """ "NAME/TASK,TASK" -> name and tasks; tasks None for "NAME" alone (the policy's own), ["all"] for "NAME/all"."""
    name, slash, tasks = text.partition("/")
    chosen = [task.strip() for task in tasks.split(",") if task.strip()]
    if not name or (slash and not chosen):
        raise ConfigError(f"env is {text!r}; give NAME, NAME/all or NAME/TASK,TASK, e.g. metaworld-state/reach-v3")
    return name, chosen or None


def environment_for(
    policy: Any,
    name: str,
    image_size: int | None = None,
    *,
    cameras: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Env:
    """The environment with the policy's views, at the size of its training images unless another is given.

    `cameras` says which of the environment's views shows what the policy calls otherwise (see
    `actok.evaluation.compatibility.cameras_of`); `options` are further ones of the environment. One that takes no
    `views`, or no `image_size`, shows what it always shows (see `Env.with_views`): whether that is what the policy looks
    at, its first observation tells (`check_observation`).

    Raises ConfigError as `make_env` does, for a view that the environment does not know, for an image size where the
    policy sees no images or the environment takes none, and for none where its training images were not all square and of
    one size.
    """
    from actok.evaluation.compatibility import cameras_of

    env = make_env(name, **(options or {}))
    shown = cameras_of(policy, cameras)
    if not shown:
        if image_size is not None:
            raise ConfigError(
                f"images of {image_size} pixels are asked for, but the policy looks at none; leave it out"
            )
        return env
    if env.known_views and (missing := [v for v, camera in shown.items() if camera not in env.known_views]):
        raise ConfigError(
            f"the policy looks through {', '.join(shown)}; environment {name!r} has no view"
            f" {', '.join(shown[view] for view in missing)}, only {', '.join(env.known_views)}; say which of these"
            f" shows what with --cameras {' '.join(f'{view}=...' for view in missing)}"
        )
    views = list(dict.fromkeys(shown.values()))
    if "image_size" not in option_names(type(env)):
        if image_size is not None:
            raise ConfigError(
                f"images of {image_size} pixels are asked for, but environment {name!r} has no option image_size: its"
                " pictures have a size of their own; leave it out"
            )
        return env.with_views(views)
    return env.with_views(views, _trained_size(policy) if image_size is None else image_size)


def _trained_size(policy: Any) -> int:
    """Side of all images that the policy was trained on. Raises ConfigError where there is no such thing."""
    sizes = {side for height_width in policy.meta.get("image_sizes", {}).values() for side in height_width}
    if len(sizes) != 1:
        raise ConfigError(
            f"the policy's training images have sides of {', '.join(map(str, sorted(sizes))) or 'unknown'} pixels, and"
            " simulators render squares; give the size with --images"
        )
    return int(sizes.pop())


def roll_out(
    policy: str | Path,
    env: str,
    out: str | Path,
    *,
    episodes: int = 10,
    seed: int = 0,
    device: str | None = None,
    precision: str | None = None,
    image_size: int | None = None,
    cameras: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    decoding: Mapping[str, Any] | None = None,
    record: int | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], Path]:
    """Roll a saved policy out and write `out`/rollout.json, rollout.html and recordings; the result, and the folder.

    Args:
        policy: folder of `actok train-policy`, or Hub id.
        env: see `split_env`.
        out: folder; results of an earlier rollout there are replaced.
        episodes: of each task.
        seed: of start states and draws.
        device: as torch names it; None: CUDA where there is one, else the CPU.
        precision: in which the policy computes, see `Policy.with_precision`; None: on the CPU float32, elsewhere that of its
            training.
        image_size: of the policy's views, height and width in pixels; None: as in training.
        cameras, options: see `environment_for`.
        decoding: how the policy draws its actions, over what was saved; see `Policy.with_decoding`.
        record: episodes to film; None: 2 where the environment has cameras.
        settings: see `actok.evaluation.rollout.rollout`.

    Nothing is written, and no folder made, before the episodes are over. Raises ConfigError as `environment_for` and
    `rollout` do, for a device that is not there or has too little memory, and where `out` cannot be written to.
    """
    from torch import OutOfMemoryError
    from tqdm import tqdm

    from actok.evaluation.rollout import rollout
    from actok.policies.load import load_policy

    name, tasks = split_env(env)
    folder = Path(out)
    place = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"out is {folder}, but {place} is no folder that can be written to; name another one")
    where = _device(device)
    given = dict(decoding or {})
    loaded = load_policy(policy).with_decoding(**given)
    simulator = environment_for(loaded, name, image_size, cameras=cameras, options=options)
    chosen = list(simulator.tasks) if tasks == ["all"] else tasks
    if record is None:
        record = 2 if simulator.default_views else 0
    loaded, told = _set_up(loaded, where, precision)
    if settings.get("progress", True):
        tqdm.write(f"actok: {told}", sys.stderr)
    try:
        result = rollout(
            simulator,
            loaded.to(where),
            chosen,
            episodes,
            cameras=cameras,
            seed=seed,
            record=record,
            out=folder,
            **settings,
        )
    except OutOfMemoryError as error:
        raise ConfigError(
            f"{where} has too little memory for this policy ({' '.join(str(error).split())[:120]}); give precision bf16, a"
            " smaller batch, or device cpu"
        ) from error
    result["policy"]["source"] = str(policy)
    result["set"] = given
    result["provenance"] = provenance(seed)
    write_results(result, folder / "rollout.json")
    write_bytes(folder / "rollout.html", render_rollout(plain(result), folder))
    return result, folder


def _device(name: str | None) -> Any:
    """The device of that name; CUDA where there is one, else the CPU, where none is named."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"device {name!r} cannot be used ({reason}); name one that this machine has, such as cpu, cuda or cuda:1, or"
            " leave it out"
        ) from error
    return device


def _set_up(policy: Any, device: Any, precision: str | None) -> tuple[Any, str]:
    """The policy in its precision, and a line on where and how it acts."""
    trained = policy.meta.get("training", {}).get("config", {}).get("precision")
    if precision is None:
        precision = "bf16" if trained == "bf16" and device.type != "cpu" else "float32"
    other = ", though it was trained in bf16 (--precision bf16)" if (trained, precision) == ("bf16", "float32") else ""
    return policy.with_precision(precision), f"the policy acts on {device} in {precision}{other}"


def rollout_columns(result: Mapping[str, Any]) -> list[Column]:
    """One row a task, the last one for all of them."""
    rows = list(result["per_task"].items())
    total = {
        "n": len(result["success"]),
        "success": sum(result["success"]),
        "rate": result["rate"],
        "ci95": result["ci95"],
        "invalid": result["invalid"],
        "limit": None,
        "steps_to_success": result["steps_to_success"],
    }
    if len(rows) > 1:
        rows.append(("all", total))
    return [
        Column(title="task", meaning="", cells=tuple(name for name, _ in rows)),
        Column(
            title="success",
            meaning="episodes that are solved",
            cells=tuple(f"{r['success']} of {r['n']}" for _, r in rows),
        ),
        Column(title="rate", meaning="", cells=tuple(percent(r["rate"]) for _, r in rows)),
        Column(
            title="95 % CI",
            meaning="Wilson",
            cells=tuple(f"{percent(r['ci95'][0])} to {percent(r['ci95'][1])}" for _, r in rows),
        ),
        Column(
            title="invalid",
            meaning="episodes that ended because a chunk was not valid; never executed",
            cells=tuple(str(r["invalid"]) for _, r in rows),
        ),
        Column(title="steps", meaning="to success, mean", cells=tuple(number(r["steps_to_success"]) for _, r in rows)),
        Column(
            title="limit", meaning="steps", cells=tuple("-" if r["limit"] is None else str(r["limit"]) for _, r in rows)
        ),
    ]


def rollout_text(result: Mapping[str, Any]) -> str:
    """The table, and how the policy was called."""
    title = f"{result['policy'].get('source', 'policy')} in {result['env']['name']}: {_how(result)}"
    return "\n".join([title, "", *render_columns(rollout_columns(result)), "", *_sentences(result)])


def render_rollout(result: Mapping[str, Any], folder: Path) -> str:
    """The page as HTML: tables, latency, and the recordings in `folder` (pictures inside, videos as links)."""
    policy = result["policy"]
    parts = [
        f"<h1>Rollout in {escape(result['env']['name'])}</h1>",
        f"<p>{escape(str(policy.get('source', policy['kind'])))}: {escape(_how(result))}.</p>",
        html_table(rollout_columns(result)),
        *(f"<p>{escape(sentence)}</p>" for sentence in _sentences(result)),
        "<h2>Latency</h2>",
        "<p class=note>Milliseconds a call. Batched: the calls of this rollout. Single: observations of this rollout one at"
        " a time, on one thread.</p>",
        html_table(latency_columns(result)),
    ]
    if result.get("recordings"):
        parts.append("<h2>Recordings</h2>")
    for film in result.get("recordings", []):
        picture = base64.b64encode((folder / film["sheet"]).read_bytes()).decode()
        outcome = f"{film['task']}, episode {film['number']}: {'success' if film['success'] else 'failure'}"
        link = f' <a href="{escape(film["video"])}">video</a>' if film["video"] else ""
        parts.append(
            f"<p><b>{escape(outcome)}</b> at step {film['steps']}, view {escape(film['view'])}.{link}"
            f"{'' if film['reproduced'] else ' <span class=error>Not reproduced when filmed.</span>'}</p>"
            f'<div class=scroll><img alt="{escape(outcome)}" src="data:image/png;base64,{picture}"></div>'
        )
    facts = {
        "policy": f"{policy['kind']}, {policy['parameters']:,} parameters, chunks of {policy['horizon']} steps",
        "tokenizer": f"{policy['tokenizer']['kind']}, weights {policy['tokenizer']['weights'][:16]}",
        "computes": f"on {policy['device']} in {policy['precision']}",
        "draws by": ", ".join(f"{key} {value}" for key, value in policy.get("decoding", {}).items()),
        "sees": ", ".join([*policy["views"], *([f"a state of {policy['proprio']}"] if policy["proprio"] else [])]),
        **made_under(result["provenance"]),
    }
    parts.append(f"<h2>Provenance</h2>\n{html_facts(facts)}")
    return html_page(f"actok rollout: {result['env']['name']}", parts)


def latency_columns(result: Mapping[str, Any]) -> list[Column]:
    """Stages of a policy call, in batches and alone."""
    batched, single = result["latency"]["batched"], result["latency"]["single"]

    def cells(part: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(f"{number(ms['p50'])} / {number(ms['p95'])}" for ms in part["ms"].values())

    return [
        Column(title="stage", meaning="", cells=tuple(batched["ms"])),
        Column(
            title="batched",
            meaning=f"median / 95th percentile of {batched['n']} calls for {number(batched['mean_size'])} robots on average",
            cells=cells(batched),
        ),
        Column(title="single", meaning=f"of {single['n']} observations", cells=cells(single)),
    ]


def _how(result: Mapping[str, Any]) -> str:
    steps = (
        f"every step a chunk of {result['policy']['horizon']}, averaged with weight {result['ensemble']:g}"
        if result["ensemble"] is not None
        else f"{result['execute']} of {result['policy']['horizon']} steps of each chunk executed"
    )
    deadline = result.get("deadline_ms")
    late = "" if deadline is None else f"a call's codes end after {deadline:g} ms, "
    given = "".join(f"{name} set to {value}, " for name, value in result.get("set", {}).items())
    return f"head {result['head']}, {given}{steps}, {late}seed {result['seed']}"


def _sentences(result: Mapping[str, Any]) -> list[str]:
    batched, single = result["latency"]["batched"], result["latency"]["single"]
    total = single["ms"]["total"]
    seconds = result["seconds"]
    return [
        f"{result['chunks']} chunks in {result['calls']} calls, {number(result['passes'])} passes a chunk;"
        f" {result['invalid']} invalid, {result['clipped']} values moved inside the limits",
        f"latency of a chunk: {number(total['p50'])} ms alone (p95 {number(total['p95'])}, one thread),"
        f" {number(batched['ms_per_chunk'])} ms in batches of {number(batched['mean_size'])};"
        f" {result['steps']} steps in {seconds['total']:.0f} s, {seconds['policy']:.0f} s of them in the policy",
    ]
