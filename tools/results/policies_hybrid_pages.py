"""Pages on flow matching beside codes, on blocks, and on latency."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from results.policies import BLOCKS_OF, FLOW_EXPERT, TOKEN_EXPERT, PolicyJob
from results.policies_success_pages import NOTHING, commands, made_by, rate_cell, seed_cells, short
from results.policies_tables import exceeding

# X-Tokenizer's authors (arXiv 2606.14752): mean progress on seven tasks of real robots, per cent.
PUBLISHED_HYBRID: Mapping[str, float] = {
    "flow": 49.8,
    "flow+plain-rvq": 69.1,
    "flow+fast": 73.0,
    "flow+xtokenizer-tiny": 77.4,
}
# FASTer's authors (arXiv 2512.04952, table 7): success on LIBERO in per cent, milliseconds a chunk on an RTX 5090.
PUBLISHED_BLOCKS: Mapping[str, tuple[float, float]] = {
    "token-wise": (95.5, 323),
    "block-wise": (96.7, 140),
    "block-wise with action expert": (97.7, 140),
}
# The same, table 2: one arm, two views, milliseconds.
PUBLISHED_STAGES = "16 + 72 + 3 passes of 7.4 (token-wise 21 of 6.4) + 2.7; 112 together"
STAGES = ("images", "prefix", "pass", "actions", "decode", "total")

LARGE = (
    "PaliGemma's size (3 B parameters) with random weights in bf16, a chunk of 7 dimensions as FASTerVQ's 21 codes, the expert 1024"
    " wide: `python benchmarks/policy_latency.py --paligemma` (`--force` where there is no GPU)."
)

__all__ = ["PUBLISHED_BLOCKS", "PUBLISHED_HYBRID", "blocks_page", "hybrid_page", "latency_page", "ordering"]


def hybrid_page(body: Mapping[str, Any], jobs: Iterable[PolicyJob] = ()) -> str:
    """Success of the flow head by what stood beside it in training."""
    lines = [
        "# Do tokens help a policy that does not act through them?",
        "",
        made_by(body["conditions"]),
        "",
        f"One backbone, data, steps and seeds; a flow-matching expert of width {FLOW_EXPERT} reads its keys and values, and"
        " its gradient goes into the backbone. Beside it the backbone learns the codes of a frozen tokenizer, or nothing"
        " (`flow`; the normaliser is FAST's). The flow head acts; `codes act`: the same policy through its codes."
        " [Every figure](hybrid.json); how policies are trained and rolled out: [success by tokenizer](metaworld.md).",
        "",
        "published: mean progress on seven tasks of real robots (arXiv 2606.14752), with a pretrained model of another size."
        " Only the order can be compared.",
        "",
    ]
    if not body["variants"]:
        return "\n".join([*lines, NOTHING])
    lines += [
        "| trained on | flow acts | seed by seed | codes act | ms, flow | published |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, heads in body["variants"].items():
        flow = heads["flow"]
        lines.append(
            f"| {name} | {rate_cell(flow)} | {', '.join(seed_cells(flow))} | {rate_cell(heads['tokens'])} |"
            f" {short(flow['ms'])} | {body['published'][name]:.1f} |"
        )
    rates = {name: heads["flow"]["rate"] for name, heads in body["variants"].items()}
    invalid = sum(part["invalid"] for heads in body["variants"].values() for part in heads.values() if part)
    lines += [
        "",
        f"Invalid chunks: {invalid}.",
        "",
        ordering(rates, body["published"]),
        "",
        exceeding(body["pairs"]),
        "",
        *commands(jobs),
    ]
    return "\n".join(lines)


def ordering(rates: Mapping[str, float], published: Mapping[str, float]) -> str:
    """Whether measured figures stand in the published order."""
    if set(rates) != set(published):
        missing = ", ".join(name for name in published if name not in rates)
        return f"Not yet measured: {missing}."
    wanted = sorted(published, key=lambda name: published[name])
    found = sorted(rates, key=lambda name: rates[name])
    told = " < ".join(found)
    if len(set(rates.values())) == len(rates) and found == wanted:
        return f"The published order appears: {told}."
    return f"The published order ({' < '.join(wanted)}) does not appear; here it is {told}."


def blocks_page(body: Mapping[str, Any], jobs: Iterable[PolicyJob] = ()) -> str:
    """Success and time by block size, with and without expert."""
    lines = [
        "# Block-wise and token-wise",
        "",
        made_by(body["conditions"]),
        "",
        f"Policies of `{BLOCKS_OF}`: 21 codes a chunk, in its own order (codebook, time, part), trained and decoded in blocks"
        f" of another size. expert: an action expert of width {TOKEN_EXPERT} that emits the codes, trained from the first step"
        " with the backbone. [Every figure](blocks.json); recipe: [success by tokenizer](metaworld.md).",
        "",
    ]
    if not body["variants"]:
        return "\n".join([*lines, NOTHING])
    lines += [
        "| variant | success | seeds | passes | ms, median | ms, 95 % | invalid |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in body["variants"].items():
        label = f"{name} (its own blocks)" if name == BLOCKS_OF else name
        worst = max(seed["ms_p95"] for seed in row["seeds"].values())
        lines.append(
            f"| {label} | {rate_cell(row)} | {len(row['seeds'])} | {short(row['passes'])} | {short(row['ms'])} |"
            f" {short(worst)} | {row['invalid']} |"
        )
    for name, (rate, ms) in body["published"].items():
        lines.append(f"| *published: {name}* | {rate:.1f} % | | | {ms:.0f} | | |")
    lines += [
        "",
        "ms: a chunk for one observation on one thread, beside other work ([alone, stage by stage](latency.md)). published:"
        " LIBERO with PaliGemma on an RTX 5090 (arXiv 2512.04952, table 7), for the ratio of the times and the order.",
        "",
        *_ratio(body["alone"]),
        exceeding(body["pairs"]),
        "",
        *commands(jobs),
    ]
    return "\n".join(lines)


def _ratio(alone: Mapping[str, float]) -> list[str]:
    """Of the times that were measured alone on the machine."""
    one, own = alone.get("block-1"), alone.get(BLOCKS_OF)
    if one is None or own is None:
        return []
    return [
        f"Alone on the machine token-wise takes {one / own:.2f} times as long as in its own blocks ({short(one)} and"
        f" {short(own)} ms); published: {323 / 140:.2f} times.",
        "",
    ]


def latency_page(body: Mapping[str, Any]) -> str:
    """The stages of a call, policy by policy."""
    lines = [
        "# Where the time of a call goes",
        "",
        "Made by `python benchmarks/policy_latency.py`: one observation at a time, median of the calls in milliseconds (of the"
        " total also the 95th percentile). images: prompt and image encoders; prefix: the pass over the observation; pass:"
        " one of the passes that emit the codes (or of the flow's steps), actions: all of them; decode: codes to actions."
        " [Figures as JSON](latency.json).",
        "",
        "Policies with views are untrained twins of those without, shown noise; where sequences end by themselves their total"
        " is put together from the stages, with the passes of the trained policy (~).",
        "",
        f"FASTer's table 2 (PaliGemma, one arm, two views, RTX 5090): images + prefix + passes + decode = {PUBLISHED_STAGES}.",
    ]
    if not body["measured"]:
        return "\n".join([*lines, "", NOTHING])
    for name, found in body["measured"].items():
        c = found["conditions"]
        lines += [
            "",
            f"## {name}",
            "",
            f"actok {c['actok']}, commit {c['commit']}, {found['device'] if found['device'] != 'cpu' else c['cpu']}, torch"
            f" {c['packages']['torch']}, {found['threads']} thread, {c['created']}, {found['rows'][0]['calls']} calls each.",
            "",
            *([LARGE, ""] if name == "paligemma" else []),
            *_stages(found["rows"]),
        ]
    return "\n".join(lines)


def _stages(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| policy | head | views | passes | " + " | ".join(STAGES) + " |",
        "|---|---|---:|---:|" + "---:|" * len(STAGES),
    ]
    for row in rows:
        cells = [short(row["ms"][stage]["p50"]) for stage in STAGES]
        p95 = row["ms"]["total"]["p95"]
        cells[-1] = f"~{cells[-1]}" if row["composed"] else f"{cells[-1]} ({short(p95)})"
        lines.append(
            f"| {row['policy']} | {row['head']} | {row['views']} | {short(row['passes'])} | " + " | ".join(cells) + " |"
        )
    return lines
