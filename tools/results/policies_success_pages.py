"""Pages on success by tokenizer, and the index."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from actok.policies.presets import find_policy_preset
from results.places import SEED
from results.policies import (
    BATCH,
    EXECUTE,
    HORIZON,
    LIMIT,
    MAIN,
    POLICY_STEPS,
    PRESET,
    SEEDS,
    SUITES,
    TOKENIZERS,
    PolicyJob,
    Suite,
    TokenizerJob,
)
from results.policies_tables import exceeding
from results.training import assignments

COMMAND = "make results ONLY=policies TEACHER=..."
NOTHING = "Nothing is measured yet."
# How `VLAConfig.state` is said.
STATE = {"text": "as text", "vector": "as a vector", "none": "not at all"}

__all__ = [
    "COMMAND",
    "NOTHING",
    "commands",
    "conditions",
    "index_page",
    "made_by",
    "percent",
    "rate_cell",
    "seed_cells",
    "short",
    "success_page",
]


def conditions(made: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of several rollouts together: every commit and processor, the first and the last time."""
    if not made:
        return None
    return {
        "actok": sorted({p["actok"] for p in made}),
        "commits": sorted(
            {str(p["commit"])[:12] + ("-dirty" if str(p["commit"]).endswith("-dirty") else "") for p in made}
        ),
        "cpu": sorted({p["cpu"] for p in made}),
        "torch": sorted({str(p["packages"].get("torch")) for p in made}),
        "from": min(p["created"] for p in made),
        "to": max(p["created"] for p in made),
        "seeds": sorted({p["seed"] for p in made}),
    }


def made_by(found: Mapping[str, Any] | None) -> str:
    """One line under a page's title."""
    if found is None:
        return f"Made by `{COMMAND}`. {NOTHING}"
    return (
        f"Made by `{COMMAND}`: actok {', '.join(found['actok'])}, commit {', '.join(found['commits'])},"
        f" {', '.join(found['cpu'])}, torch {', '.join(found['torch'])}, one thread a process, {found['from']} to"
        f" {found['to']}, seeds {', '.join(map(str, found['seeds']))}."
    )


def commands(jobs: Iterable[PolicyJob]) -> list[str]:
    """What fits the tokenizers, trains these policies and rolls one of them out; in capitals what lies where."""
    jobs = list(jobs)
    if not jobs:
        return []
    suite = SUITES[jobs[0].suite]
    lines = [_fit(TOKENIZERS[name], suite) for name in dict.fromkeys(job.tokenizer for job in jobs)]
    for job in jobs:
        text = [
            "actok",
            "train-policy",
            "--policy",
            PRESET,
            "--tokenizer",
            f"TOKENIZERS/{job.tokenizer}",
            "--data",
            "DATA",
        ]
        text += ["--seed", str(SEED), "--train", *assignments({"steps": POLICY_STEPS, "seed": job.seed})]
        text += ["--set", *assignments(job.settings)] if job.settings else []
        lines.append(shlex.join([*text, "--out", f"POLICIES/{job.variant}"]))
    heads = list(dict.fromkeys(head for job in jobs for head in job.heads))
    head = heads[0] if len(heads) == 1 else "HEAD"
    lines += [
        f"actok rollout --policy POLICIES/NAME --env {suite.env}/{','.join(suite.tasks)} --episodes {suite.episodes}"
        f" --seed {jobs[0].seed} --head {head} --execute {EXECUTE} --limit {LIMIT:g} --batch {BATCH} --out ROLLOUT"
    ]
    return [f"Commands, of seed {jobs[0].seed}:", "", "```", *lines, "```"]


def _where(suite: Mapping[str, Any]) -> str:
    """The environment, and the task where it is a single one."""
    return suite["env"] if len(suite["tasks"]) > 1 else f"{suite['env']}/{suite['tasks'][0]}"


def _fit(job: TokenizerJob, suite: Suite) -> str:
    text = ["actok", "fit", job.preset, "--data", "DATA", "--horizon", str(HORIZON), "--seed", str(SEED)]
    if job.steps is not None:
        text += ["--train", f"steps={round(job.steps * suite.share)}"]
    text += ["--features", "FEATURES"] if job.features else []
    text += ["--align", *assignments(job.align)] if job.align else []
    return shlex.join([*text, "--out", f"TOKENIZERS/{job.name}"])


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def short(value: float | None) -> str:
    """Three significant digits; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def rate_cell(row: Mapping[str, Any]) -> str:
    """Success with its interval."""
    if not row:
        return "-"
    low, high = row["ci95"]
    return f"{percent(row['rate'])} ({100 * low:.1f} to {100 * high:.1f})"


def seed_cells(row: Mapping[str, Any]) -> list[str]:
    """Success of each of SEEDS."""
    seeds = row.get("seeds", {})
    return [percent(seeds[str(seed)]["rate"]) if str(seed) in seeds else "-" for seed in SEEDS]


def recipe(steps: int, demonstrations: int) -> str:
    """How every policy is trained and rolled out."""
    state = STATE[find_policy_preset(PRESET).policy["state"]]
    return (
        f"Every policy is `{PRESET}`, {steps} steps on {demonstrations} scripted demonstrations of each task; it"
        f" reads the instruction and the state (robot, objects and goal) {state}, no images, and gives chunks of {HORIZON} steps,"
        f" of which {EXECUTE} are executed. An episode ends at success or at {LIMIT:g} times the mean length of the"
        " demonstrations. Policies of a seed differ in their tokenizer alone and meet the same start states, none of which is a"
        " demonstration's. success: all seeds together, 95 % interval of Wilson in brackets."
    )


def success_page(suite: str, body: Mapping[str, Any], jobs: Iterable[PolicyJob] = ()) -> str:
    """One suite: the table, who differs, task by task, and whether errors predict success; `jobs` are those of a seed."""
    about = body["suite"]
    lines = [
        f"# Success by tokenizer: {_where(about)}",
        "",
        made_by(body["conditions"]),
        "",
        f"{len(about['tasks'])} task{'s' if len(about['tasks']) > 1 else ''}, {about['episodes']} episode{'s' if about['episodes'] > 1 else ''} of each task and seed. {recipe(body['steps'], body['demonstrations'])}"
        f" [Every figure, seed by seed and episode by episode]({suite}.json).",
        "",
    ]
    if not body["variants"]:
        return "\n".join([*lines, NOTHING])
    rows = sorted(body["variants"].items(), key=lambda item: -item[1]["rate"])
    lines += [
        f"![Success against tokens per chunk]({suite}.png)",
        "",
        "| tokenizer | success | "
        + " | ".join(f"seed {seed}" for seed in SEEDS)
        + " | invalid | tokens | passes | ms | l1 |",
        "|---|---:|" + "---:|" * (len(SEEDS) + 5),
    ]
    for name, row in rows:
        codec = row["codec"] or {}
        cells = [
            name,
            rate_cell(row),
            *seed_cells(row),
            str(row["invalid"]),
            short(row["tokens"]),
            short(row["passes"]),
            short(row["ms"]),
            short(codec.get("l1")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "invalid: episodes that ended because a chunk could not be decoded. tokens: of a training chunk, mean. passes:"
        " forward passes that emitted a chunk's tokens, mean over the rollouts; of a batch of chunks as many as the longest needs."
        " ms: median time of a chunk for one observation"
        " on one thread, measured beside other work ([alone](latency.md)). l1: mean error of held-out chunks through the"
        " tokenizer, normalised units.",
        "",
        *commands(jobs),
        "",
        "## Which differences exceed the interval",
        "",
        exceeding(body["pairs"]),
        "",
        *_matrix(body["pairs"]),
        "",
        *_of_one_seed(body["pairs_of_one_seed"]),
        *_tasks(rows, about["tasks"]),
        "",
        "## Does a lower error predict success?",
        "",
        *_ranks(body),
        *_filmed(suite, body),
    ]
    return "\n".join(lines)


def _of_one_seed(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of tokenizers that do not have every seed, each pair over the seeds that both have."""
    return [f"Pairs of which one has a single seed, over that: {exceeding(found)}", ""] if found else []


def _filmed(suite: str, body: Mapping[str, Any]) -> list[str]:
    """A success and a failure, and the command that films them."""
    filmed = body["filmed"]
    if not filmed:
        return []
    about = body["suite"]
    lines = ["", "## Two episodes", ""]
    for outcome, sheet in filmed["sheets"].items():
        told = (
            f"{outcome} at step {sheet['steps']}" if outcome == "success" else f"no success in {sheet['steps']} steps"
        )
        lines += [f"{filmed['variant']}, {sheet['task']}, episode {sheet['number']}: {told}.", ""]
        lines += [f"![{sheet['task']}: {told}]({suite}-{outcome}.png)", ""]
    return [
        *lines,
        "```",
        f"actok rollout --policy POLICIES/{filmed['variant']} --env {about['env']}/{','.join(about['tasks'])} --episodes"
        f" {filmed['episodes']} --seed {filmed['seed']} --head tokens --execute {EXECUTE} --limit {LIMIT:g} --batch {BATCH}"
        " --record 2 --out ROLLOUT",
        "```",
    ]


def _matrix(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Differences of success in points, row less column; bold where they exceed their interval."""
    by_pair = {}
    for row in found:
        by_pair[row["a"], row["b"]] = (row["difference"], row["exceeds"])
        by_pair[row["b"], row["a"]] = (-row["difference"], row["exceeds"])
    names = list(dict.fromkeys(name for name, _ in by_pair))
    if not names:
        return []
    lines = ["Row less column, in points; bold: beyond the interval.", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for a in names:
        cells = []
        for b in names:
            difference, exceeds = by_pair.get((a, b), (None, False))
            text = "" if difference is None else f"{100 * difference:+.1f}"
            cells.append(f"**{text}**" if exceeds else text)
        lines.append(f"| {a} | " + " | ".join(cells) + " |")
    return lines


def _tasks(rows: Sequence[tuple[str, Mapping[str, Any]]], tasks: Sequence[str]) -> list[str]:
    lines = ["## Task by task", "", "Success in per cent, all seeds together.", ""]
    lines += ["| tokenizer | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    for name, row in rows:
        cells = [f"{100 * row['per_task'][task]['rate']:.0f}" if task in row["per_task"] else "-" for task in tasks]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _ranks(body: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, meaning in (("l1", "l1 error of held-out chunks"), ("tokens", "tokens a chunk")):
        found = body["rank_correlation"][key]
        if found is None:
            lines.append(f"* {meaning} and success: fewer than four tokenizers are measured, or all alike.")
            continue
        firm = "is not told from chance" if found["p_value"] >= 0.05 else "is told from chance"
        lines.append(
            f"* {meaning} and success: Spearman's rho {found['rho']:+.2f} over {found['n']} tokenizers, which {firm} (p ="
            f" {found['p_value']:.2g}, permutation test)."
        )
    return [*lines, "", "An error that predicted success would have a rho near -1."]


def index_page(
    bodies: Mapping[str, Mapping[str, Any]], hybrid: Mapping[str, Any], blocks: Mapping[str, Any], *, scale: float
) -> str:
    """What there is, the main table, and the commands."""
    trial = [] if scale == 1 else [f"**A trial at {scale:g} of all steps and episodes; no results.**", ""]
    lines = [
        "# Policies that act through the tokens",
        "",
        *trial,
        made_by(next((body["conditions"] for body in bodies.values() if body["conditions"]), None)),
        "",
        "Small policies without pretraining, trained for minutes on one thread of a CPU: this compares tokenizers and ways"
        " of decoding under one recipe, and says nothing of what large pretrained ones reach.",
        "",
        *(f"* [Success by tokenizer: {_where(body['suite'])}]({suite}.md)" for suite, body in bodies.items()),
        "* [Flow matching with and without tokens beside it](hybrid.md)",
        "* [Block-wise and token-wise, with and without action expert](blocks.md)",
        "* [Where the time goes](latency.md)",
        "",
        *_main_table(bodies),
        "",
        "```",
        *(
            f"actok collect --env {suite.env} --tasks {','.join(suite.tasks)} --seed {SEED} --episodes {suite.demonstrations}"
            f" --out {suite.data}"
            for suite in SUITES.values()
        ),
        "actok features --data DATA --teacher sentence-transformers/all-MiniLM-L6-v2 --out FEATURES",
        "```",
        "",
        "How each tokenizer is fitted and each policy trained and rolled out stands on the pages.",
        "",
        f"Rolled out: {_count(bodies, hybrid, blocks)} variants.",
    ]
    return "\n".join(lines)


def _main_table(bodies: Mapping[str, Mapping[str, Any]]) -> list[str]:
    order = dict.fromkeys((*MAIN, *TOKENIZERS))
    there = [name for name in order if any(name in body["variants"] for body in bodies.values())]
    if not there:
        return [NOTHING]
    lines = ["| tokenizer | " + " | ".join(_where(body["suite"]) for body in bodies.values()) + " |"]
    lines.append("|---|" + "---:|" * len(bodies))
    for name in there:
        cells = [rate_cell(body["variants"].get(name, {})) for body in bodies.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _count(bodies: Mapping[str, Mapping[str, Any]], *others: Mapping[str, Any]) -> int:
    return sum(len(body["variants"]) for body in (*bodies.values(), *others))
