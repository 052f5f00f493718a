"""The pages on policies, written from the measured JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from actok.core.files import write_bytes
from results import policies
from results.curves import figures
from results.places import portable
from results.policies import BLOCKS, BLOCKS_OF, HYBRID, POLICY_JOBS, TOKENIZERS, PolicyJob
from results.policies_asked import Studio
from results.policies_hybrid_pages import PUBLISHED_BLOCKS, PUBLISHED_HYBRID, blocks_page, hybrid_page, latency_page
from results.policies_pictures import copy_sheet, draw_success
from results.policies_success_pages import conditions, index_page, success_page
from results.policies_tables import Rolls, pairs, rank_correlation, slim_rollout, summary
from results.training import kept_specification

__all__ = ["load_rolls", "write_policy_pages"]


def write_policy_pages(studio: Studio, chosen: Mapping[str, PolicyJob] = POLICY_JOBS) -> None:
    """All pages, pictures, and the JSON that they rest on. A page without any rollout says so."""

    def write(name: str, page: str, body: Mapping[str, Any]) -> None:
        write_bytes(studio.pages / f"{name}.md", page.rstrip() + "\n")
        text = portable(json.dumps(body, indent=1) + "\n", studio.places.data_root)
        write_bytes(studio.pages / f"{name}.json", text)

    def of_page(body: Mapping[str, Any], suite: str, part: str) -> list[PolicyJob]:
        of_seed = [j for j in chosen.values() if (j.suite, j.seed) == (suite, min(policies.SEEDS)) and part in j.parts]
        return [job for job in of_seed if job.variant in body["variants"]]

    bodies = {}
    for suite in policies.SUITES:
        body = success_body(studio, suite, chosen)
        if body["variants"]:
            draw_success(body, studio.pages / f"{suite}.png")
        for name, sheet in body["filmed"].get("sheets", {}).items():
            copy_sheet(studio.filmed(policies.SUITES[suite]) / sheet["file"], studio.pages / f"{suite}-{name}.png")
        write(suite, success_page(suite, body, of_page(body, suite, "tokenizers")), body)
        bodies[suite] = body
    hybrid, blocks = hybrid_body(studio, chosen), blocks_body(studio, chosen)
    write("hybrid", hybrid_page(hybrid, of_page(hybrid, "metaworld", "hybrid")), hybrid)
    write("blocks", blocks_page(blocks, of_page(blocks, "metaworld", "blocks")), blocks)
    measured = latency_body(studio)
    write("latency", latency_page(measured), measured)
    page = index_page(bodies, hybrid, blocks, scale=studio.places.scale)
    write_bytes(studio.pages / "README.md", page.rstrip() + "\n")


def load_rolls(
    studio: Studio, suite: str, part: str, chosen: Mapping[str, PolicyJob]
) -> tuple[dict[tuple[str, str], Rolls], list[Mapping[str, Any]]]:
    """Slim rollouts by (variant, head) and seed, of those that were made as they are asked for now, and their provenance."""
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    made = []
    for job in chosen.values():
        if job.suite != suite or part not in job.parts:
            continue
        for head in job.heads:
            folder = studio.rolled(job, head)
            spec = studio.rollout_specification(job, head)
            if spec is None or kept_specification(folder) != spec or not (folder / "rollout.json").exists():
                continue
            rolled = json.loads((folder / "rollout.json").read_bytes())
            found.setdefault((job.variant, head), {})[job.seed] = slim_rollout(rolled)
            made.append(rolled["provenance"])
    return {key: dict(sorted(rolls.items())) for key, rolls in found.items()}, made


def _of_head(rolls: Mapping[tuple[str, str], Rolls], head: str) -> dict[str, Rolls]:
    return {variant: found for (variant, one), found in rolls.items() if one == head}


# -- one page a suite -------------------------------------------------------------------------------------------------


def success_body(studio: Studio, suite: str, chosen: Mapping[str, PolicyJob]) -> dict[str, Any]:
    """Success of every tokenizer's policy beside the tokenizer's error on held-out episodes."""
    rolls, made = load_rolls(studio, suite, "tokenizers", chosen)
    by_tokenizer = _of_head(rolls, "tokens")
    errors = _errors(studio, suite)
    variants = {
        name: {**summary(by_tokenizer[name]), "codec": errors.get(name)} for name in TOKENIZERS if name in by_tokenizer
    }
    full = {name: by_tokenizer[name] for name in variants if set(by_tokenizer[name]) >= set(policies.SEEDS)}
    both = [(v["codec"]["l1"], v["rate"]) for v in variants.values() if v["codec"] is not None]
    few = [(v["tokens"], v["rate"]) for v in variants.values() if v["tokens"] is not None]
    found = policies.SUITES[suite]
    return {
        "conditions": conditions(made),
        "suite": {"env": found.env, "tasks": list(found.tasks), "episodes": studio.scaled(found.episodes, 1)},
        "steps": studio.scaled(policies.POLICY_STEPS, 2),
        "demonstrations": studio.demonstrations(found),
        "variants": variants,
        "pairs": pairs(full),
        "pairs_of_one_seed": [
            row
            for row in pairs({name: by_tokenizer[name] for name in variants})
            if row["a"] not in full or row["b"] not in full
        ],
        "rank_correlation": {
            "l1": rank_correlation([l1 for l1, _ in both], [rate for _, rate in both]),
            "tokens": rank_correlation([tokens for tokens, _ in few], [rate for _, rate in few]),
        },
        "steps_per_tokenizer": {name: TOKENIZERS[name].steps for name in variants},
        "filmed": filmed_body(studio, found),
    }


def filmed_body(studio: Studio, suite: policies.Suite) -> dict[str, Any]:
    """Of the filmed policy: which it is, and its sheets by outcome; empty where nothing is filmed as it is asked for."""
    folder = studio.filmed(suite)
    spec = studio.film_specification(suite)
    if spec is None or kept_specification(folder) != spec or not (folder / "rollout.json").exists():
        return {}
    sheets = {}
    for film in json.loads((folder / "rollout.json").read_bytes())["recordings"]:
        outcome = "success" if film["success"] else "failure"
        sheets[outcome] = {
            "file": film["sheet"],
            **{key: film[key] for key in ("task", "number", "steps", "reproduced")},
        }
    return {"variant": spec["variant"], "episodes": spec["episodes"], "seed": spec["seed"], "sheets": sheets}


def _errors(studio: Studio, suite: str) -> dict[str, dict[str, float]]:
    """Error and size of the tokenizers on held-out chunks, by name."""
    path = studio.root / "bench" / suite / "results.json"
    if not path.exists():
        return {}
    found = {}
    for unit in json.loads(path.read_bytes())["results"]:
        if (own := figures(unit)) is not None:
            found[unit["tokenizer"]] = {"l1": own.l1, "bits": own.bits, "tokens": own.tokens, "vrr_0.03": own.vrr[0]}
    return found


# -- comparisons on Meta-World ----------------------------------------------------------------------------------------


def hybrid_body(studio: Studio, chosen: Mapping[str, PolicyJob]) -> dict[str, Any]:
    """Flow matching alone and beside codes; success of both heads."""
    rolls, made = load_rolls(studio, "metaworld", "hybrid", chosen)
    flow, tokens = _of_head(rolls, "flow"), _of_head(rolls, "tokens")
    order = [name for name in HYBRID if name in flow]
    return {
        "conditions": conditions(made),
        "variants": {name: {"flow": summary(flow[name]), "tokens": summary(tokens.get(name, {}))} for name in order},
        "pairs": pairs({name: flow[name] for name in order}),
        "published": PUBLISHED_HYBRID,
    }


def blocks_body(studio: Studio, chosen: Mapping[str, PolicyJob]) -> dict[str, Any]:
    """Block sizes of one tokenizer, expert on and off."""
    rolls, made = load_rolls(studio, "metaworld", "blocks", chosen)
    by_variant = _of_head(rolls, "tokens")
    order = [name for name in (BLOCKS_OF, *BLOCKS) if name in by_variant]
    variants = {name: {**summary(by_variant[name]), "settings": dict(BLOCKS.get(name, {}))} for name in order}
    alone = latency_body(studio)["measured"].get("metaworld", {"rows": []})["rows"]
    return {
        "conditions": conditions(made),
        "variants": variants,
        "alone": {
            row["policy"]: row["ms"]["total"]["p50"]
            for row in alone
            if (row["head"], row["views"]) == ("tokens", 0) and row["policy"] in order
        },
        "pairs": pairs({name: by_variant[name] for name in order}),
        "published": PUBLISHED_BLOCKS,
    }


def latency_body(studio: Studio) -> dict[str, Any]:
    """What benchmarks/policy_latency.py measured, by suite; "paligemma" where it was run into that folder."""
    found = {}
    for name in (*policies.SUITES, "paligemma"):
        path = studio.root / "latency" / name / "latency.json"
        if path.exists():
            found[name] = json.loads(path.read_bytes())
    return {"measured": found}
