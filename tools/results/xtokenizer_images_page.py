"""The page on features that see, from the measured JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from results.training import kept_specification
from results.xtokenizer import ABLATION_STEPS, IMAGES, SEEDS, Workshop
from results.xtokenizer_images import (
    DATA,
    IMAGE_JOBS,
    JUDGED,
    NEW,
    TEACHER_STEPS,
    VARIANTS,
    teacher_facts,
    teacher_of,
)
from results.xtokenizer_tables import (
    COMMAND,
    LEVELS,
    PROBED,
    cell,
    conditions,
    limits,
    plain,
    semantic_figures,
    semantic_row,
    share,
    whole,
)

MEANING = {
    "images": "features of image and words, by the teacher trained here",
    "words": "features of the same words alone, by the sentence encoder of the other pages",
    "neither": "no objective: plain residual VQ",
}

RETRIEVED = ("text_to_chunk", "chunk_to_text")

__all__ = ["images_body", "images_page"]


def images_body(work: Workshop) -> dict[str, Any]:
    """Everything the page rests on, as JSON values."""
    judged = {}
    for name in JUDGED:
        path = work.root / "bench" / f"images-{name}" / "results.json"
        if path.exists():
            found = json.loads(path.read_text())
            labels = found["semantics"][0]
            judged[name] = {
                "conditions": found["provenance"],
                "test_episodes": found["datasets"][0]["episodes"]["test"],
                "test_chunks": found["datasets"][0]["test_chunks"]["used"],
                "raw": labels.get("raw") or {},
                "variants": {v: _rows(v, found["results"]) for v in VARIANTS},
            }
    features = {}
    for variant in ("images", "words"):
        for path in teacher_of(variant, work).features.glob(f"{DATA}-*/meta.json"):
            meta = json.loads(path.read_text())
            features[variant] = {k: meta[k] for k in ("rows", "views", "teacher")} | {"dim": meta["teacher"]["dim"]}
    return {"teacher": teacher_facts(work), "features": features, "judged": judged, "jobs": _jobs(work)}


def _rows(variant: str, units: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By seed: the ablation's figures, and the probes' intervals."""
    rows: dict[str, dict[str, Any]] = {}
    for unit in units:
        name, _, seed = unit["tokenizer"].rpartition("-")
        if name != variant or unit["status"] != "ok":
            continue
        row: dict[str, Any] = dict(semantic_row(unit))
        for level in semantic_figures(unit).get("levels", []):
            for label, probe in level["probes"].items():
                row[f"interval_{label}_{'all' if level['level'] is None else level['level']}"] = [
                    probe["low"],
                    probe["high"],
                ]
        rows[seed] = row
    return rows


def _jobs(work: Workshop) -> dict[str, Any]:
    found = {}
    for name in IMAGE_JOBS:
        config = work.tokenizer(name) / "config.json"
        if config.exists():
            training = json.loads(config.read_text())["meta"]["training"]
            found[name] = {"spec": kept_specification(work.folder(name)), "training": training}
    return found


def images_page(body: Mapping[str, Any]) -> str:
    """The teacher, and what the three variants' codes say."""
    first = next(iter(body["judged"].values()), None)
    lines = [
        "# Features that see",
        "",
        conditions(first["conditions"] if first else None),
        "",
        "The other pages align codes with features of words, which do not change within a phase. Here the teacher is shown the"
        f" image of each frame as well. It is trained on the images themselves ({', '.join(IMAGES)}), then frozen; its"
        f" features of {DATA} align xtokenizer-tiny, {ABLATION_STEPS} steps, up to {len(SEEDS)} seeds, in the defaults' weights."
        " Beside it stand the same training with features of words alone, and without any. [Every figure, seed by seed](images.json).",
        "",
        *(f"* `{name}`: {text}" for name, text in MEANING.items()),
        "",
        "The labels that are asked for are in the words that both teachers read. So the probes cannot show what an image adds to"
        " them, but whether features that change with every image align codes as well as words do, and whether that holds for"
        " recordings that nobody has seen.",
        "",
        "```",
        f"actok teacher --data {' '.join(IMAGES)} --out TEACHER --steps {TEACHER_STEPS} --seed 0",
        f"actok features --data {DATA} --teacher TEACHER --out FEATURES",
        f"actok fit xtokenizer-tiny --data {DATA} --features FEATURES --horizon 20 --train steps={ABLATION_STEPS} --out TOKENIZER",
        f"actok bench --data {DATA} --tokenizers TOKENIZER --semantics --features FEATURES --out RESULTS",
        "```",
        "",
        f"All of it, with the rest of these pages: `{COMMAND}`.",
        "",
        "## The teacher",
        "",
        *_teacher(body),
        *_judged(body),
    ]
    return "\n".join(lines)


def _teacher(body: Mapping[str, Any]) -> list[str]:
    facts = body["teacher"]
    if facts is None:
        return ["Not trained yet."]
    held = facts["held_out"]
    lines = [
        f"{facts['frames']} frames of {facts['episodes']} episodes, {facts['training']['steps']} steps of"
        f" {facts['training']['batch_size']} frames, {facts['seconds']:.0f} s; the episodes that it and the tokenizers are trained"
        " on are the same.",
    ]
    if held:
        lines += [
            f"Of {held['frames']} images of held-out episodes, the right one of {held['texts']} texts is the nearest in"
            f" {share(held['recall_1'])} (chance {share(held['chance_1'])}), one of the right task in {share(held['task'])}"
            f" ({share(held['task_chance'])}); given the task, the right phase in {share(held['phase'])} (always the usual one:"
            f" {share(held['phase_usual'])}).",
        ]
    told = [f"{name}: {found['rows']} of {found['dim']} numbers" for name, found in body["features"].items()]
    return [*lines, f"Distinct features of {DATA}: {'; '.join(told)}." if told else ""]


def _judged(body: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    words = {
        "own": f"Held-out episodes of {DATA}",
        "new": f"Other recordings of the same tasks ({NEW}), no images",
    }
    for name, found in body["judged"].items():
        asked = any(f"{RETRIEVED[0]}_recall1" in row for rows in found["variants"].values() for row in rows.values())
        retrieved = RETRIEVED if asked else ()
        columns = ["seeds", *PROBED, "bits: instruction", "bits: phase", "l1", "noise 0.008"]
        columns += [way.replace("_", " ") for way in retrieved]
        lines += [
            "",
            f"## {words[name]}",
            "",
            f"{found['test_chunks']} chunks of {found['test_episodes']} test episodes. Probes of level-0 codes: mean over seeds;"
            " in brackets the lowest and highest end of the seeds' 95 % intervals, from resampling test episodes. Other"
            " figures: mean (smallest to largest). Bits of the instruction are 0 where a task has a single test episode.",
            "",
            f"| aligned with | {' | '.join(columns)} |",
            "|---|" + "---:|" * len(columns),
        ]
        for variant, rows in found["variants"].items():
            cells = [
                str(len(rows)),
                *(_probe(rows, f"{label}_0") for label in PROBED),
                *(cell(rows, f"bits_{label}_0", _bits) for label in ("instruction", "phase")),
                *(cell(rows, column, plain) for column in ("l1", "noise_0.008")),
                *(cell(rows, f"{way}_recall1", share) for way in retrieved),
            ]
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
        lines += [
            "",
            limits(found["raw"]),
            "",
            "The phase, level by level, and perplexity of the levels:",
            "",
            "| aligned with | "
            + " | ".join([*(f"phase {q}" for q in LEVELS), *(f"perplexity {q}" for q in LEVELS)])
            + " |",
            "|---|" + "---:|" * (2 * len(LEVELS)),
        ]
        for variant, rows in found["variants"].items():
            cells = [
                *(_probe(rows, f"phase_{q}") for q in LEVELS),
                *(cell(rows, f"perplexity_{q}", whole) for q in LEVELS),
            ]
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return lines


def _bits(value: float) -> str:
    """Rounding errors are 0."""
    return plain(value) if abs(value) > 1e-9 else "0"


def _probe(rows: Mapping[str, Mapping[str, Any]], name: str) -> str:
    values = [row[f"probe_{name}"] for row in rows.values() if f"probe_{name}" in row]
    ends = [row[f"interval_{name}"] for row in rows.values() if row.get(f"interval_{name}", [None])[0] is not None]
    if not values:
        return "-"
    mean = share(sum(values) / len(values))
    return f"{mean} ({100 * min(e[0] for e in ends):.0f} to {100 * max(e[1] for e in ends):.0f})" if ends else mean
