"""The tables on X-Tokenizer: the ablation, every robot, shared codes; from the measured JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from results.curves import figures
from results.places import METAWORLD
from results.xtokenizer import ABLATION_STEPS, ALONE_STEPS, LEFT_OUT, SEEDS, UNION_STEPS
from results.xtokenizer_measure import CRITERION, FAST_UNION

COMMAND = "make results ONLY=semantic TEACHER=... DATA_ROOT=..."
LEVELS = (0, 1, 2, 3)
PROBED = ("task", "phase", "verb")
MEANING = {
    "full": "xtokenizer-tiny, all objectives",
    "no-masking": "without masked action modelling",
    "no-alignment": "without InfoNCE",
    "no-prediction": "without next-frame prediction",
    "masking-actions": "masked modelling of the actions instead of the codes (the project page's variant)",
    "plain-rvq": "the same network, no objective: plain residual VQ",
    "relative-frames": "all objectives; commands summed up from the chunk's start, as in the paper, instead of step by step",
    "fastervq": "fastervq-tiny at as many tokens and bits",
    "fastervq-aligned": "the same, trained with all objectives",
}
# X-Tokenizer's authors (arXiv 2606.14752), on their data: reconstruction l1, token error rate at noise of .008,
# perplexity and use of the levels in per cent.
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "X-Tokenizer": {
        "l1": 0.01693,
        "noise_0.008": 0.526,
        **dict(zip((f"perplexity_{q}" for q in LEVELS), (510.0, 700.0, 828.0, 916.0), strict=True)),
        **dict(zip((f"used_{q}" for q in LEVELS), (0.76, 0.94, 0.99, 1.0), strict=True)),
    },
    "plain RVQ": {"l1": 0.00815},
    "256 bins": {"l1": 0.00486, "noise_0.008": 0.597},
    "FAST": {"l1": 0.01446, "noise_0.008": 1.445},
}

__all__ = [
    "COMMAND",
    "LEVELS",
    "PROBED",
    "PUBLISHED",
    "ablation_page",
    "arms_page",
    "cell",
    "conditions",
    "limits",
    "plain",
    "retrieval_of_chunks",
    "rows_by_seed",
    "semantic_figures",
    "semantic_row",
    "share",
    "whole",
]

Column = tuple[str, str, Callable[[float], str]]


def conditions(p: Mapping[str, Any] | None) -> str:
    if p is None:
        return f"Made by `{COMMAND}`; nothing is measured yet."
    return (
        f"Made by `{COMMAND}`: actok {p['actok']}, commit {p['commit'] or 'unknown'}, {p['cpu']}, torch"
        f" {p['packages']['torch']}, one thread, {p['created']}, split of seed {p['seed']}."
    )


# -- figures of a unit ------------------------------------------------------------------------------------------------


def semantic_figures(unit: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `actok bench --semantics` measured of a tokenizer; nothing where it failed."""
    found: Mapping[str, Any] = (unit.get("semantics") or {}).get("figures") or {}
    return found


def semantic_row(unit: Mapping[str, Any]) -> dict[str, float]:
    """The figures of the ablation's tables of one measured tokenizer, by column; those it has none of are left out."""
    found: dict[str, float | None] = {}
    if (own := figures(unit)) is not None:
        found |= {"l1": own.l1, "vrr_0.03": own.vrr[0], "vrr_0.1": own.vrr[1], "bits": own.bits, "tokens": own.tokens}
    semantics = semantic_figures(unit)
    for level in semantics.get("levels", []):
        name = "all" if level["level"] is None else str(level["level"])
        found |= {f"perplexity_{name}": level["use"]["perplexity"], f"used_{name}": level["use"]["used"]}
        found |= {f"probe_{label}_{name}": p["accuracy"] for label, p in level["probes"].items()}
        found |= {f"bits_{label}_{name}": i["excess"] for label, i in level["information"].items()}
    if noise := semantics.get("noise"):
        found |= {f"noise_{s:g}": r for s, r in zip(noise["sigma"], noise["error_rate"], strict=True)}
    if both := semantics.get("retrieval"):
        for way in ("text_to_chunk", "chunk_to_text"):
            found |= {f"{way}_{k}": both[way][k] for k in ("recall1", "recall5", "chance1", "median_rank")}
    for one in semantics.get("substitution", []):
        state = "_state" if one["state"] else ""
        found |= {f"substitution{state}_{k}": one[k] for k in ("own", "other", "difference")}
    return {k: float(v) for k, v in found.items() if v is not None}


def rows_by_seed(variant: str, units: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Rows of a variant by seed; a closed-form tokenizer, which has none, under the seed of the split."""
    named = [(seed, u) for seed, u in units if u["tokenizer"] in (variant, f"{variant}-{seed}") and u["status"] == "ok"]
    return {str(seed): semantic_row(u) for seed, u in named}


def plain(value: float) -> str:
    return f"{value:.3g}"


def whole(value: float) -> str:
    return f"{value:.0f}"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def cell(rows: Mapping[str, Mapping[str, float]], column: str, text: Callable[[float], str]) -> str:
    """Mean over the seeds and, where there are several, the range."""
    values = [row[column] for row in rows.values() if column in row]
    if not values:
        return "-"
    mean = text(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({text(min(values))} to {text(max(values))})"


def _table(body: Mapping[str, Any], columns: Sequence[Column], *, published: bool = False) -> list[str]:
    lines = ["| tokenizer | " + " | ".join(title for title, _, _ in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    rows = {**body["variants"], **body["references"]}
    for name, found in rows.items():
        cells = [cell(found, column, text) for _, column, text in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, figure in body["published"].items() if published else ():
        cells = [text(figure[column]) if column in figure else "-" for _, column, text in columns]
        if any(cell != "-" for cell in cells):
            lines.append(f"| *published: {name}* | " + " | ".join(cells) + " |")
    return lines


# -- ablation ---------------------------------------------------------------------------------------------------------


def ablation_page(body: Mapping[str, Any]) -> str:
    """Every variant with the same columns."""
    tasks = "" if body["tasks"] is None else f" ({body['tasks']} tasks)"
    noise: list[Column] = [(f"noise {s}", f"noise_{s}", plain) for s in ("0.004", "0.006", "0.008")]
    lines = [
        "# Which objective makes the codes semantic?",
        "",
        conditions(body["conditions"]),
        "",
        f"All variants on {METAWORLD}{tasks}, {ABLATION_STEPS} steps of gradient descent each, chunks of 20 steps,"
        f" judged on held-out episodes: mean over up to {len(SEEDS)} seeds of training (smallest to largest). Columns:"
        " [semantics](../../semantics.md), [metrics](../../metrics.md). [Every figure, seed by seed](ablation.json).",
        "",
        *(f"* `{name}`: {MEANING[name]}" for name in body["variants"]),
        "",
        "The published figures are of other data, a network of another size and days of training: what can be compared is"
        " their order.",
        "",
        "## Reconstruction and robustness",
        "",
        "l1: mean error in normalised units. noise: token error rate under Gaussian noise of that standard deviation.",
        "",
        *_table(
            body,
            [
                ("bits", "bits", whole),
                ("l1", "l1", plain),
                ("VRR at 0.03", "vrr_0.03", plain),
                ("VRR at 0.1", "vrr_0.1", plain),
                *noise,
            ],
            published=True,
        ),
        "",
        "## What the first level says",
        "",
        "Accuracy of a linear probe on the level-0 codes of chunks of held-out episodes; information between a level-0"
        " code and a label, in bits, less its value under the labels of other episodes.",
        "",
        *_table(
            body,
            [
                *((f"probe: {label}", f"probe_{label}_0", share) for label in PROBED),
                ("bits: instruction", "bits_instruction_0", plain),
                ("bits: phase", "bits_phase_0", plain),
            ],
        ),
        "",
        limits((body["labels"] or {}).get("raw") or {}),
        "",
        "The same probe for the phase, level by level, and for all codes together:",
        "",
        *_table(
            body,
            [*((f"level {q}", f"probe_phase_{q}", share) for q in LEVELS), ("all", "probe_phase_all", share)],
        ),
        "",
        "## Words and motion",
        "",
        "Retrieval between the instructions of the test chunks and their level-0 codes, right answers first (R@1);"
        " substitution: cosine between the true motion and the one decoded from codes that the words alone choose, less"
        " that from another instruction's words.",
        "",
        *_table(
            body,
            [
                ("text to chunk", "text_to_chunk_recall1", share),
                ("by chance", "text_to_chunk_chance1", share),
                ("chunk to text", "chunk_to_text_recall1", share),
                ("by chance", "chunk_to_text_chance1", share),
                ("substitution", "substitution_difference", plain),
                ("with state", "substitution_state_difference", plain),
            ],
        ),
        "",
        *retrieval_of_chunks((body["labels"] or {}).get("raw_retrieval")),
        "## Perplexity and use of the levels",
        "",
        "The published pattern is that level 0 has the lowest perplexity.",
        "",
        *_table(body, [(f"perplexity {q}", f"perplexity_{q}", whole) for q in LEVELS], published=True),
        "",
        *_table(body, [(f"used {q}", f"used_{q}", share) for q in LEVELS], published=True),
    ]
    return "\n".join(lines)


def limits(raw: Mapping[str, Any]) -> str:
    """What a probe of the chunks themselves reaches, and what it would reach without looking."""
    known = [
        f"{label} {share(raw[label]['accuracy'])} and {share(raw[label]['majority'])}"
        for label in PROBED
        if "accuracy" in raw.get(label, {})
    ]
    if not known:
        return ""
    return f"The same probe on the chunks themselves, and always naming the most frequent label: {'; '.join(known)}."


def retrieval_of_chunks(raw: Mapping[str, Any] | None) -> list[str]:
    """What the same linear map finds from the chunks themselves; nothing where it was not measured."""
    if raw is None:
        return []
    ways = [f"{way.replace('_', ' ')} {share(raw[way]['recall1'])}" for way in ("text_to_chunk", "chunk_to_text")]
    return [f"The same retrieval from the chunks themselves: {', '.join(ways)}.", ""]


# -- many arms --------------------------------------------------------------------------------------------------------


def arms_page(arms: Mapping[str, Any] | None, shared: Mapping[str, Any] | None) -> str:
    """One frozen tokenizer for all robots, robots left out, and codes shared between arms."""
    lines = [
        "# One frozen tokenizer, many arms",
        "",
        conditions(arms["provenance"] if arms else None),
        "",
        f"`union`: xtokenizer-tiny with all objectives, {UNION_STEPS} steps on all robots; `left out`: the same without"
        " that robot, which is then encoded through `adapt`, the embodiment unknown to the network (refused: it has channels"
        " that no other robot has); `alone`: one tokenizer"
        f" for that robot, {ALONE_STEPS} steps; `plain RVQ`: the union without objectives; `FASTerVQ`: fastervq-tiny of as"
        " many tokens and bits; `FAST`: fitted on the training chunks of all robots, variable length. l1 in normalised"
        " units, on held-out episodes; in brackets the share of steps within 0.1. [Figures as JSON](arms.json).",
        "",
        "Robots named arm_...: achieved end-effector paths of Lift, Stack and PickPlaceBread in robosuite, and of LIBERO.",
        "",
        *(_arms_table(arms) if arms else ["Nothing is measured yet."]),
        "",
        "## Codes that arms share",
        "",
        "Two chunks of two arms are the same motion where they are of the same phase of the same task and their achieved"
        f" end-effector paths, relative to their starts, stay within {1000 * CRITERION.position_m:g} mm and"
        f" {CRITERION.rotation_rad:g} rad of each other on average; chunks that move less than"
        f" {1000 * CRITERION.least_m:g} mm are left out. Each held-out chunk of the first arm is paired with the nearest one"
        " of the second, of all its episodes. Shares are of equal level-0 codes, slot by slot, state and embodiment given. chance: the same"
        " chunks against all chunks of other phases (so what exceeds it is the phase and the path together). same arm: pairs of two episodes of one arm, the most that can be"
        " expected (their paths are nearer, see mm). Brackets: 95 % intervals over episodes of both arms.",
        "",
        *(_shared_table(shared) if shared and shared["results"] else ["Nothing is measured yet."]),
    ]
    return "\n".join(lines)


def _arms_table(arms: Mapping[str, Any]) -> list[str]:
    by_robot: dict[str, dict[str, str]] = {}
    for unit in arms["results"]:
        found = figures(unit)
        text = "-" if found is None else f"{found.l1:.3g} ({100 * found.vrr[1]:.0f} %)"
        by_robot.setdefault(unit["dataset"], {})[unit["tokenizer"]] = text
    lines = [
        "| robot | D | Hz | chunks | union | left out | alone | plain RVQ | FASTerVQ | FAST |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, cells in by_robot.items():
        robot = arms["robots"][name]
        columns = (
            "union",
            f"without-{name}",
            f"alone-{name}",
            "union-plain-rvq",
            "union-fastervq",
            FAST_UNION,
        )
        lines.append(
            f"| {name} | {robot['dim']} | {robot['rate_hz'] or '-'} | {robot['test_chunks']} | "
            + " | ".join(cells.get(column, _none(name, column)) for column in columns)
            + " |"
        )
    return lines


def _none(robot: str, column: str) -> str:
    """What stands where nothing is measured."""
    return "refused" if column == f"without-{robot}" and robot not in LEFT_OUT else "-"


def _shared_table(shared: Mapping[str, Any]) -> list[str]:
    def estimate(found: Mapping[str, Any] | None) -> str:
        if found is None:
            return "-"
        value, low, high = (found[k][0] for k in ("value", "low", "high"))
        if low is None or high is None:
            return share(value)
        return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    lines = [
        "| arms | tokenizer | pairs | mm | equal | chance | equal less chance | same arm | mm |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in shared["results"]:
        notes = "" if row["by_task"] else " (by phase alone)"
        notes += f", {' and '.join(row['adapted'])} through adapt" if row["adapted"] else ""
        same = row["same_arm_deviation_m"]
        lines.append(
            f"| {row['a']}, {row['b']}{notes} | {row['tokenizer']} | {row['pairs']} | {1000 * row['deviation_m']:.1f} |"
            f" {estimate(row['share'])} | {estimate(row['chance'])} | {estimate(row['excess'])} |"
            f" {estimate(row['same_arm'])} | {'-' if same is None else f'{1000 * same:.1f}'} |"
        )
    return lines
