"""actok list and actok inspect"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Dispatch on the verb."""
    return _list(args) if args.verb == "list" else _inspect(args)


def _list(args: argparse.Namespace) -> int:
    from actok.core.registry import CONFIGS, read_toml, tokenizer_presets

    if args.what == "tokenizers":
        rows = [
            {"name": p.name, "summary": p.summary, "paper": p.paper, "settings": dict(p.settings)}
            for p in tokenizer_presets().values()
        ]
    elif args.what == "envs":
        rows = _environments()
    else:
        rows = []
        for path in sorted((CONFIGS / args.what).glob("*.toml")):
            values = read_toml(path)
            rows.append({"name": path.stem, "summary": values.get("summary") or values.get("note", "")})
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        width = max(len(r["name"]) for r in rows)
        for row in rows:
            print(f"{row['name']:{width}}  {row['summary']}")
    return 0


def _environments() -> list[dict[str, Any]]:
    """What each environment is, or how to install it."""
    from actok.core import ActokError
    from actok.envs import list_envs, make_env

    rows: list[dict[str, Any]] = []
    for name in sorted(list_envs()):
        try:
            env = make_env(name)
            tasks = list(env.tasks)
        except ActokError as error:
            rows.append({"name": name, "summary": str(error), "tasks": None})
            continue
        some = tasks if len(tasks) <= 3 else [*tasks[:2], "..."]
        state = "" if env.proprio_size is None else f"; a state of {env.proprio_size}"
        summary = f"{len(tasks)} tasks ({', '.join(some)}); actions of {env.space.dim} at {env.rate_hz:g} Hz{state}"
        rows.append({"name": name, "summary": summary, "tasks": tasks})
    return rows


def _inspect(args: argparse.Namespace) -> int:
    from actok.core import ArtifactError
    from actok.training import load

    try:
        tokenizer = load(args.path)
    except ArtifactError as error:
        if (folder := _model_folder(args.path)) is None:
            return _inspect_data(args, error)
        from actok.policies.load import is_policy

        if is_policy(folder):
            return _inspect_policy(args)
        raise
    # Published FAST files may state neither horizon nor action space; there is no layout without them.
    layout = tokenizer.layout if tokenizer.horizon and tokenizer.spaces else None
    bits = layout.bits if layout and layout.fixed_length else None
    facts = {
        "kind": tokenizer.kind,
        "hash": tokenizer.weights_hash,
        "horizon": tokenizer.horizon,
        "vocab_size": tokenizer.vocab_size,
        "tokens": [layout.min_len, layout.max_len] if layout else None,
        "bits": bits,
        "total": layout.total if layout else False,
        "passes": layout.passes if layout and layout.fixed_length else None,
        "settings": vars(tokenizer.config) if hasattr(tokenizer, "config") else {},
        "meta": dict(tokenizer.meta),
        "embodiments": {name: space.to_dict() for name, space in tokenizer.spaces.items()},
    }
    if args.json:
        print(json.dumps(facts, indent=2, default=list))
        return 0
    unknown = "unknown before horizon and action space are given"
    length = unknown
    if layout:
        length = str(layout.max_len) if layout.fixed_length else f"{layout.min_len} to {layout.max_len}"
    _table(
        [
            ("tokenizer", tokenizer.kind),
            ("hash", tokenizer.weights_hash),
            ("horizon", f"{tokenizer.horizon} steps" if tokenizer.horizon else "any; to be named in every call"),
            ("vocabulary", f"{tokenizer.vocab_size} codes"),
            ("tokens a chunk", length if bits is None else f"{length}, {bits:.0f} bits"),
            ("decodes", "always" if facts["total"] else "where valid says so; constraint() makes it always"),
            *((f"setting {key}", str(value)) for key, value in facts["settings"].items()),
            *(("fitted on", _fitted_on(d)) for d in tokenizer.meta.get("data", [])),
        ]
    )
    if report := tokenizer.meta.get("tolerance"):
        print(report["summary"])
    _spaces([(space, f"embodiment {name}") for name, space in tokenizer.spaces.items()])
    return 0


def _model_folder(path: str) -> Path | None:
    """The folder, or download, where a model should be; None where there is none."""
    from actok.core import ArtifactError
    from actok.core.artifact import CONFIG_FILE, locate

    try:
        folder = locate(path)
    except ArtifactError:
        return None
    return folder if (folder / CONFIG_FILE).is_file() else None


def _inspect_policy(args: argparse.Namespace) -> int:
    from actok.cli.policy import training_text
    from actok.evaluation.policy_calls import policy_facts
    from actok.policies.load import load_policy

    policy: Any = load_policy(args.path)
    facts = {**policy_facts(policy), "settings": vars(policy.config), "space": policy.space.to_dict()}
    if args.json:
        print(json.dumps(facts, indent=2, default=list))
        return 0
    tokenizer, meta = facts["tokenizer"], facts["meta"]
    sizes = meta.get("image_sizes", {})
    state = f"{policy.proprio} numbers, as {policy.config.state}" if policy.proprio else "not read"
    tasks = meta.get("task_steps", {})
    _table(
        [
            ("policy", facts["kind"] + (f", preset {meta['preset']}" if "preset" in meta else "")),
            ("tokenizer", f"{tokenizer['kind']}, hash {tokenizer['weights']}"),
            ("robot", policy.embodiment),
            ("horizon", f"{policy.horizon} steps"),
            ("heads", ", ".join(policy.heads)),
            *(_view(view, sizes.get(view)) for view in policy.views),
            *([] if policy.views else [("views", "none")]),
            ("state", state),
            ("parameters", f"{facts['parameters']:,}"),
            *((f"setting {key}", str(value)) for key, value in facts["settings"].items()),
            *((f"task {task}", f"demonstrations of {steps:.0f} steps on average") for task, steps in tasks.items()),
        ]
    )
    print(training_text(policy))
    _spaces([(policy.space, f"embodiment {policy.embodiment}")])
    return 0


def _inspect_data(args: argparse.Namespace, error: Exception) -> int:
    from actok.core import DataError, MissingExtraError
    from actok.data import open_dataset

    try:
        dataset = open_dataset(args.path, space=args.space)
    except DataError as other:
        raise DataError(f"{args.path} is neither a model ({error}) nor a dataset ({other})") from None
    first = dataset.episode(0)
    lengths = dataset.lengths
    sizes: dict[str, tuple[int, int]] | None
    try:
        sizes = dataset.view_sizes()
        views = [_view(view, size) for view, size in sizes.items()] or [("views", "none")]
    except MissingExtraError as missing:  # what else there is can be told without
        sizes, views = None, [("views", f"unknown: {missing}")]
    state = None if first.proprio is None else first.proprio.shape[1]
    facts: dict[str, Any] = {
        "name": dataset.name,
        "episodes": len(dataset),
        "frames": int(lengths.sum()),
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "instruction": first.instruction,
        "views": sizes,
        "state": state,
        "space_origin": dataset.space_origin,
        "space": dataset.space.to_dict(),
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    _table(
        [
            ("dataset", dataset.name),
            ("episodes", f"{len(dataset)}, {lengths.min()} to {lengths.max()} steps, {lengths.sum()} in all"),
            ("first instruction", repr(first.instruction)),
            ("sub-tasks", ", ".join(first.subtask_names) or "none"),
            *views,
            ("state", "none" if state is None else f"{state} numbers"),
        ]
    )
    _spaces([(dataset.space, dataset.space_origin)])
    return 0


def _view(name: str, size: Sequence[int] | None) -> tuple[str, str]:
    """A row: how `--views` takes it, and width and height."""
    pixels = "size unknown" if size is None else f"{size[1]} x {size[0]} pixels"
    short = name.rpartition(".")[2]
    return f"view {name}", pixels if short == name else f"{pixels}; train-policy takes {short} too"


def _fitted_on(facts: dict[str, Any]) -> str:
    return (
        f"{facts['name']}: {facts['train_chunks']} chunks of {facts['episodes']} episodes' training part;"
        f" space {facts['space_origin']}"
    )


def _table(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def _spaces(spaces: Sequence[tuple[Any, str]]) -> None:
    from actok.data import describe_space

    for space, origin in spaces:
        print()
        print(describe_space(space, origin))
