"""The pages on X-Tokenizer, written from the measured JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actok.core.files import write_bytes
from actok.data import find_space
from results.places import METAWORLD, SEED, portable
from results.training import kept_specification
from results.xtokenizer import (
    ABLATION,
    LEFT_OUT,
    SEEDS,
    SEMANTIC_JOBS,
    UNION,
    SemanticJob,
    Workshop,
    trained,
)
from results.xtokenizer_images_page import images_body, images_page
from results.xtokenizer_measure import REFERENCES
from results.xtokenizer_pictures import draw_codes, draw_maps
from results.xtokenizer_tables import (
    COMMAND,
    PUBLISHED,
    ablation_page,
    arms_page,
    conditions,
    rows_by_seed,
    semantic_figures,
    share,
)

DRAWN = ("full", "plain-rvq")

__all__ = ["write_semantic_pages"]


def write_semantic_pages(work: Workshop, chosen: Mapping[str, SemanticJob] = SEMANTIC_JOBS) -> None:
    """All pages, pictures, and the JSON that they rest on."""

    def write(name: str, page: str, body: Mapping[str, Any]) -> None:
        write_bytes(work.pages / f"{name}.md", page.rstrip() + "\n")
        text = portable(json.dumps(body, indent=1) + "\n", work.places.data_root)
        write_bytes(work.pages / f"{name}.json", text.replace(work.teacher, "TEACHER"))

    bench = work.root / "bench"
    results = {seed: _load(bench / f"ablation-{seed}" / "results.json") for seed in SEEDS}
    units = [(seed, unit) for seed, found in results.items() if found for unit in found["results"]]
    first = next((found for found in results.values() if found), None)
    labels = first["semantics"][0] if first and first.get("semantics") else None
    ablation = {
        "conditions": first["provenance"] if first else None,
        "variants": {v: rows_by_seed(v, units) for v in ABLATION},
        "references": {name: rows_by_seed(name, units) for name in REFERENCES},
        "labels": None if labels is None else {k: v for k, v in labels.items() if k != "names"},
        "tasks": len(((labels or {}).get("names") or {}).get("task", ())) or None,
        "published": PUBLISHED,
    }
    write("ablation", ablation_page(ablation), ablation)
    arms, shared, speed = (_load(bench / f"{name}.json") for name in ("arms", "shared", "speed"))
    slimmer = arms and {**arms, "results": [{k: v for k, v in u.items() if k != "counts"} for u in arms["results"]]}
    body = {"errors": slimmer, "shared": shared, "speed": speed}
    write("arms", arms_page(arms, shared), body)
    pictures = _pictures(units, labels)
    write("codes", codes_page(pictures), pictures)
    drawn = draw_codes(pictures, work.pages / "codes.png", find_space("metaworld_sawyer").names)
    for name in (draw_maps(pictures, work.pages / "maps.png"), drawn):
        if name is not None:
            print(f"pages: {name}")
    seen = images_body(work)
    write("images", images_page(seen), seen)
    jobs = {name: _facts(work, name) for name in trained(work, [j.part for j in chosen.values()], chosen)}
    write("training", training_page(jobs), {"jobs": jobs})
    write_bytes(work.pages / "README.md", index_page(work, first, speed, jobs).rstrip() + "\n")


def _load(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


# -- codes ------------------------------------------------------------------------------------------------------------


def _pictures(units: Sequence[tuple[int, Mapping[str, Any]]], labels: Mapping[str, Any] | None) -> dict[str, Any]:
    """Maps and examples of the drawn variants, of the first seed."""
    found = {}
    for seed, unit in units:
        variant = unit["tokenizer"].removesuffix(f"-{seed}")
        semantics = semantic_figures(unit)
        if seed == SEEDS[0] and variant in DRAWN and semantics:
            found[variant] = {k: semantics[k] for k in ("map", "examples")}
    return {"variants": found, "names": (labels or {}).get("names") or {}}


def codes_page(pictures: Mapping[str, Any]) -> str:
    """The most used level-0 codes and the words they occur under."""
    lines = [
        "# What codes look like",
        "",
        f"Made by `{COMMAND}`; [figures as JSON](codes.json). Test chunks of {METAWORLD}, seed {SEEDS[0]} of training.",
        "",
        "![t-SNE of level-0 codes](maps.png)",
        "",
        "Each point is a chunk, placed by t-SNE of its level-0 codes; colours are the most frequent labels.",
    ]
    for variant, found in pictures["variants"].items():
        lines += [
            "",
            f"## The most used level-0 codes of {variant}",
            "",
            "| code | share | chunks | instructions |",
            "|---:|---:|---:|---|",
        ]
        for one in found["examples"] or []:
            words = "; ".join(f"{text} ({share(part)})" for text, part in one["words"])
            lines.append(f"| {one['symbol']} | {100 * one['share']:.1f} % | {one['chunks']} | {words} |")
    lines += ["", "![Motions that the most used codes decode to](codes.png)", ""]
    lines.append("Mean decoded motion of the chunks with each code, normalised units, one line a dimension.")
    return "\n".join(lines)


# -- training and index -----------------------------------------------------------------------------------------------


def _facts(work: Workshop, name: str) -> dict[str, Any]:
    config = _load(work.tokenizer(name) / "config.json")
    return {"spec": kept_specification(work.folder(name)), "training": config["meta"]["training"]}


def _images(work: Workshop) -> str:
    """Which images the teacher was shown, as the features say."""
    views = {view for path in work.features.glob("[!.]*/meta.json") for view in _load(path)["views"]}
    return f"images ({', '.join(sorted(views))})" if views else "no image"


def training_page(jobs: Mapping[str, Mapping[str, Any]]) -> str:
    """How each tokenizer was trained."""
    lines = [
        "# Training",
        "",
        f"Made by `{COMMAND}`, two jobs at a time with one thread each; [settings and figures as JSON](training.json). val"
        " l1: on validation episodes, mean over data sets, of the weights that were kept.",
        "",
        "| job | preset | data sets | objectives | parameters | steps | s | chunks/s | val l1 |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for name, facts in jobs.items():
        t, spec = facts["training"], facts["spec"]
        weights = {k: v for k, v in spec["alignment"].items() if k in ("masking", "contrast", "prediction") and v}
        read = spec["features"] is not None
        told = ", ".join(f"{k} {v:g}" for k, v in weights.items()) or ("the defaults" if read else "none")
        best = "-" if t["validation"] is None else f"{t['validation']['l1']:.4f}"
        lines.append(
            f"| {name} | {spec['preset']} | {len(spec['data'])} | {told} | {t['parameters']:,} | {t['steps']} |"
            f" {t['seconds']:.0f} | {t['chunks_per_s']:.0f} | {best} |"
        )
    return "\n".join(lines)


def index_page(
    work: Workshop, first: Mapping[str, Any] | None, speed: Mapping[str, Any] | None, jobs: Mapping[str, Any]
) -> str:
    """What there is, and the commands."""
    trial = "" if work.places.scale == 1 else f"\n**A trial with {work.places.scale:g} of all steps; no results.**\n"
    ratio = None if speed is None else speed["steps"]["all"]
    lines = [
        "# X-Tokenizer: are the codes semantic?",
        trial,
        conditions(first["provenance"] if first else None),
        "",
        f"The teacher is `{work.teacher_identity['name']}`, shown each frame's instruction and current step and {_images(work)}."
        " Tokenizers are tiny and trained for minutes on one thread of a CPU, so this compares objectives, and says nothing of"
        " what long training of the published size gives.",
        "",
        "* [Ablation](ablation.md): every objective left out in turn, plain residual VQ, FASTerVQ with and without",
        "* [Many arms](arms.md): one frozen tokenizer for all robots, robots left out, codes that arms share",
        "* [Features that see](images.md): a teacher that is shown the images, trained here",
        "* [Codes](codes.md): pictures and examples",
        "* [Training](training.md): steps, seconds, parameters",
        "* [What they say](../FINDINGS.md#semantic-codes), and where the published claims do not appear on this data;"
        " [what was tried](../../LOG.md) and did not work; [what each figure is](../../semantics.md)",
        "",
        "```",
        "actok features --data DATA --teacher TEACHER --out FEATURES",
        "actok fit xtokenizer-tiny --data DATA --features FEATURES --horizon 20 --out TOKENIZER",
        "actok bench --data DATA --tokenizers TOKENIZER --semantics --features FEATURES --out RESULTS",
        "```",
        "",
        f"{len(jobs)} of {len(SEMANTIC_JOBS)} jobs are trained. The union: {', '.join(UNION)}; left out in turn:"
        f" {', '.join(name for name in LEFT_OUT if f'without-{name}' in jobs) or 'none'}; split of seed {SEED}.",
    ]
    if speed is not None and ratio is not None:
        lines += [
            "",
            f"A training step of {speed['settings']['preset']} with all objectives takes {ratio['ratio']:.2f} times as long as"
            f" one of plain residual VQ (quartiles {ratio['ratio_quartiles'][0]:.2f} and {ratio['ratio_quartiles'][1]:.2f} of"
            f" {speed['rounds']} rounds; `python benchmarks/alignment_speed.py`).",
        ]
    return "\n".join(lines)
