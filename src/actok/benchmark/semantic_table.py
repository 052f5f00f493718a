"""Tables of the semantic figures: a row a level of each tokenizer, and a row a tokenizer for words and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actok.benchmark.table import Column, number, percent

# Labels in the order of the columns.
PROBED, INFORMED = ("task", "phase", "verb"), ("instruction", "phase")

__all__ = ["level_columns", "measured", "semantic_facts", "semantic_notes", "semantic_tables", "word_columns"]


def semantic_facts(results: Mapping[str, Any], dataset: str) -> Mapping[str, Any] | None:
    """What the results say of a dataset's labels; None where semantics were not asked for or could not be prepared."""
    found = next((f for f in results.get("semantics", ()) if f["dataset"] == dataset), None)
    return found if found is not None and found["status"] == "ok" else None


def measured(units: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The units with semantic figures."""
    return [u for u in units if u.get("semantics", {}).get("status") == "ok"]


def semantic_tables(results: Mapping[str, Any], dataset: str, units: Sequence[Mapping[str, Any]]) -> list[list[Column]]:
    """Both tables of one dataset; none where nothing was measured."""
    facts, good = semantic_facts(results, dataset), measured(units)
    if facts is None or not good:
        return []
    return [level_columns(facts, good), word_columns(facts, good)]


def level_columns(facts: Mapping[str, Any], units: Sequence[Mapping[str, Any]]) -> list[Column]:
    """A row a level, "all" for whole sequences; after the tokenizers the probes on the chunks themselves and no probe."""
    rows = [(u["tokenizer"], level) for u in units for level in u["semantics"]["figures"]["levels"]]
    probes: Mapping[str, Any] = next((level["probes"] for _, level in rows if level["probes"]), {})
    ends = [("actions", facts["raw"]), ("majority", {n: {"accuracy": p["majority"]} for n, p in probes.items()})]

    def column(title: str, meaning: str, cell: Callable[[Mapping[str, Any]], str]) -> Column:
        return Column(title=title, meaning=meaning, cells=(*(cell(level) for _, level in rows), *("-" for _ in ends)))

    columns = [
        Column(title="tokenizer", meaning="", cells=(*(name for name, _ in rows), *(name for name, _ in ends))),
        column(
            "level", "of the codes; all: whole sequences", lambda m: "all" if m["level"] is None else str(m["level"])
        ),
        column("ppl", "perplexity of the held-out codes", lambda m: number(m["use"]["perplexity"])),
        column("use", "codes used", lambda m: percent(m["use"]["used"])),
    ]
    columns += [
        Column(
            title=name,
            meaning=f"accuracy of a linear probe of {name} on held-out episodes",
            cells=tuple(
                _accuracy(p.get(name)) for p in [*(level["probes"] for _, level in rows), *(e[1] for e in ends)]
            ),
        )
        for name in PROBED
    ]
    columns += [
        column(
            f"I {name}",
            f"bits that one code says about the {name} beyond chance (share of its entropy)",
            lambda m, name=name: _bits(m["information"].get(name)),  # type: ignore[misc]
        )
        for name in INFORMED
    ]
    return columns


def word_columns(facts: Mapping[str, Any], units: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Noise, retrieval and substitution of each tokenizer; after them retrieval from the chunks themselves."""
    figures = [u["semantics"]["figures"] for u in units]
    # Figures of before there was this reference have none.
    raw = {"retrieval": facts.get("raw_retrieval"), "noise": None, "substitution": ()}
    rows, names = [*figures], [str(u["tokenizer"]) for u in units]
    if raw["retrieval"] is not None:
        rows, names = [*rows, raw], [*names, "actions"]

    def column(title: str, meaning: str, cell: Callable[[Mapping[str, Any]], str]) -> Column:
        return Column(title=title, meaning=meaning, cells=tuple(cell(f) for f in rows))

    sigma = figures[0]["noise"]["sigma"]
    return [
        Column(title="tokenizer", meaning="", cells=tuple(names)),
        column(
            "WER",
            f"token error rate, per cent, under input noise of {' / '.join(f'{s:g}' for s in sigma)}",
            lambda f: " / ".join(number(100 * rate) for rate in f["noise"]["error_rate"]) if f["noise"] else "-",
        ),
        column("to text", "R@1 / R@5 of the instruction of a chunk (chance)", lambda f: _recall(f, "chunk_to_text")),
        column("to chunk", "R@1 / R@5 of a chunk of an instruction (chance)", lambda f: _recall(f, "text_to_chunk")),
        column(
            "words",
            "cosine of motion decoded from codes likely under the chunk's words / under another instruction's",
            lambda f: _cosine(f, state=False),
        ),
        column("and state", "the same, given the state too", lambda f: _cosine(f, state=True)),
        column(
            "same phase",
            "what the own words add to those of another instruction in the same phase, cosine",
            _same_phase,
        ),
        column(
            "own codes",
            "cosine of the chunk's own reconstruction",
            lambda f: number(f["substitution"][0]["reconstruction"]) if f["substitution"] else "-",
        ),
    ]


def semantic_notes(results: Mapping[str, Any], dataset: str, units: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why figures are missing: each reason once, with the tokenizers it concerns; and failures."""
    concerned: dict[str, list[str]] = {}
    for facts in results.get("semantics", ()):
        if facts["dataset"] == dataset and facts["status"] != "ok":
            concerned.setdefault(f"no labels: {facts['error']}", []).append(dataset)
    for unit in units:
        found = unit.get("semantics")
        if found is None:
            continue
        if found["status"] != "ok":
            concerned.setdefault(f"no semantic figures: {found['error']}", []).append(unit["tokenizer"])
            continue
        figures = found["figures"]
        shown = sum(level["level"] is not None for level in figures["levels"])
        reasons = {f"no {name}: {reason}" for name, reason in figures["missing"].items()}
        reasons |= {f"no {n}: {why}" for level in figures["levels"] for n, why in level["missing"].items()}
        if shown < figures["levels_of"]:
            reasons.add(f"the first {shown} of {figures['levels_of']} levels are judged by themselves")
        for reason in sorted(reasons):
            concerned.setdefault(reason, []).append(unit["tokenizer"])
    return [f"note on {', '.join(names)}: {text}" for text, names in concerned.items()]


def _accuracy(probe: Mapping[str, Any] | None) -> str:
    return "-" if probe is None else percent(probe["accuracy"])


def _bits(information: Mapping[str, Any] | None) -> str:
    return "-" if information is None else f"{number(information['excess'])} ({percent(information['share'])})"


def _recall(figures: Mapping[str, Any], direction: str) -> str:
    if figures["retrieval"] is None:
        return "-"
    r = figures["retrieval"][direction]
    return " / ".join(f"{number(100 * r[f'recall{k}'])} ({number(100 * r[f'chance{k}'], 2)})" for k in (1, 5))


def _same_phase(figures: Mapping[str, Any]) -> str:
    found = next((s.get("same_phase") for s in figures["substitution"] if not s["state"]), None)
    return "-" if found is None else number(found)


def _cosine(figures: Mapping[str, Any], *, state: bool) -> str:
    found = next((s for s in figures["substitution"] if s["state"] == state), None)
    return "-" if found is None else f"{number(found['own'])} / {number(found['other'], 2)}"
