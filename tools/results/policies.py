"""Results of policies: which are trained on which demonstrations, through which tokenizers, and how.

Steps of the stage, each resumable (work files in runs/results/policies); policies_asked.py says what is asked for, policies_make.py does it:

    data         demonstrations of scripted experts, by `actok collect`
    tokenizers   closed-form and learned ones, by `actok fit`, and a teacher's features for the aligned one
    bench        their errors on held-out episodes, by `actok bench`
    train        one recipe for every policy, by `actok train-policy`
    rollout      closed loop in simulation, by `actok rollout`, the same start states for all policies of a seed
    film         a success and a failure of one policy of each suite, the first episodes of a rollout again
    latency      benchmarks/policy_latency.py, alone on the machine
    pages        policies_pages.py: docs/results/policies
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actok.core import merge_settings
from actok.policies.presets import find_policy_preset
from results.xtokenizer import NONE

PRESET = "actok-vla-tiny"
# Steps of gradient descent of every policy.
POLICY_STEPS = 800
# Of initial weights, batches, start states and draws. The split of the demonstrations is the same for all.
SEEDS = (0, 1)
HORIZON = 20
# Steps of each chunk that are executed; an episode ends at so many lengths of a demonstration.
EXECUTE, LIMIT = HORIZON, 1.5
# Live episodes of a rollout.
BATCH = 16
# Widths of the experts beside the small backbone.
FLOW_EXPERT, TOKEN_EXPERT = 64, 64
# Of the tokenizers' steps, where they are trained on one task.
ROBOSUITE_SHARE = 0.5

__all__ = [
    "BATCH",
    "BLOCKS",
    "BLOCKS_OF",
    "EXECUTE",
    "HORIZON",
    "HYBRID",
    "LIMIT",
    "MAIN",
    "POLICY_JOBS",
    "POLICY_STEPS",
    "PRESET",
    "SEEDS",
    "SUITES",
    "TOKENIZERS",
    "PolicyJob",
    "Suite",
    "TokenizerJob",
]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks of one environment, and the demonstrations that policies learn them from.

    Attributes:
        name: on the pages.
        env: of `actok list`.
        data: folder of the demonstrations.
        tasks: of the environment.
        demonstrations: of each task.
        episodes: rolled out of each task and seed.
        share: of the tokenizers' training steps.
        others: seeds that are spent on tokenizers beside the main ones.
        filmed: whose policy of the first seed is filmed, and episodes of each task among which a success and a failure are
            looked for.
    """

    name: str
    env: str
    data: str
    tasks: tuple[str, ...]
    demonstrations: int
    episodes: int
    share: float = 1.0
    others: tuple[int, ...] = ()
    filmed: tuple[str, int] = ("fastervq-tiny", 20)


MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)
SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="metaworld",
            env="metaworld-state",
            data="mt10",
            tasks=MT10,
            demonstrations=100,
            episodes=20,
            others=SEEDS,
            filmed=("fastervq-tiny", 1),
        ),
        # A policy of its own for each task, as robosuite's benchmarks have it: one for both moves the hand too coarsely to
        # grasp. Of 100 demonstrations a policy learns the samples by heart.
        *(
            Suite(
                name=f"robosuite-{task}",
                env="robosuite-panda-state",
                data=f"panda-{task}",
                tasks=(task,),
                demonstrations=300,
                episodes=200,
                share=ROBOSUITE_SHARE,
                others=others,
            )
            for task, others in (("lift", SEEDS[:1]), ("pick-place-bread", ()))
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class TokenizerJob:
    """A tokenizer to fit.

    Attributes:
        name: on the pages.
        preset: of `actok list`.
        steps: of gradient descent; None: closed-form.
        align: objectives over the preset's (`--align`).
        features: whether a teacher's features are read.
    """

    name: str
    preset: str
    steps: int | None = None
    align: Mapping[str, Any] = field(default_factory=dict)
    features: bool = False


def _learned(name: str, steps: int, **other: Any) -> TokenizerJob:
    return TokenizerJob(**{"name": name, "preset": name, "steps": steps, **other})


TOKENIZERS: Mapping[str, TokenizerJob] = {
    job.name: job
    for job in (
        *(TokenizerJob(name=name, preset=name) for name in ("bins", "fast", "beast", "dct", "pca")),
        _learned("oat-tiny", 2000),
        _learned("xtokenizer-tiny", 1500, features=True),
        _learned("plain-rvq", 1500, preset="xtokenizer-tiny", align=NONE),
        _learned("fastervq-tiny", 2000),
        _learned("boat-tiny", 700),
        _learned("carp-tiny", 700),
        _learned("quest-tiny", 1000),
        _learned("vqbet-tiny", 5000),
        _learned("minivla-tiny", 5000),
        _learned("vqvla-tiny", 300),
        _learned("omnisat-tiny", 2000),
        _learned("actioncodec-tiny", 900),
    )
}
# Both seeds everywhere.
MAIN = ("bins", "fast", "beast", "fastervq-tiny", "oat-tiny", "xtokenizer-tiny")
OTHERS = tuple(name for name in TOKENIZERS if name not in MAIN)


@dataclass(frozen=True, kw_only=True)
class PolicyJob:
    """A policy to train and to roll out.

    Attributes:
        suite: of SUITES.
        variant: on the pages.
        seed: of initial weights, batches, start states and draws.
        tokenizer: of TOKENIZERS.
        parts: the pages it is for: "tokenizers", "hybrid", "blocks".
        settings: over the preset's.
    """

    suite: str
    variant: str
    seed: int
    tokenizer: str
    parts: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Folder, and what it is called on the command line."""
        return f"{self.suite}-{self.variant}-{self.seed}"

    @property
    def heads(self) -> tuple[str, ...]:
        """Those that are rolled out."""
        return tuple(self.settings.get("heads", find_policy_preset(PRESET).policy["heads"]))

    def resolved(self, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """All settings of policy and training, the preset's with the job's on top."""
        preset = find_policy_preset(PRESET)
        settings = {"backbone": dict(preset.backbone), **merge_settings(preset.policy, self.settings)}
        return settings, {**preset.training, "steps": steps, "seed": self.seed}


# The tokenizer whose blocks and expert are varied; its own block is what "tokenizers" trains.
BLOCKS_OF = "fastervq-tiny"
BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "block-1": {"block": 1},
    "block-3": {"block": 3},
    "block-21": {"block": 21},
    "expert": {"token_expert": TOKEN_EXPERT},
    "expert-block-1": {"token_expert": TOKEN_EXPERT, "block": 1},
}
# Of the comparison of flow-matching policies: the tokenizer that supervises. Without one the first's normaliser is used.
HYBRID: Mapping[str, str | None] = {
    "flow": None,
    "flow+plain-rvq": "plain-rvq",
    "flow+fast": "fast",
    "flow+xtokenizer-tiny": "xtokenizer-tiny",
}


def _jobs() -> list[PolicyJob]:
    both = ("tokenizers", "blocks")
    found = [
        PolicyJob(suite="metaworld", variant=t, seed=s, tokenizer=t, parts=both if t == BLOCKS_OF else both[:1])
        for s in SEEDS
        for t in MAIN
    ]
    for seed in SEEDS:
        for variant, tokenizer in HYBRID.items():
            heads = ["flow"] if tokenizer is None else ["flow", "tokens"]
            found.append(
                PolicyJob(
                    suite="metaworld",
                    variant=variant,
                    seed=seed,
                    tokenizer=tokenizer or "fast",
                    parts=("hybrid",),
                    settings={"heads": heads, "flow_expert": FLOW_EXPERT},
                )
            )
    for seed in SEEDS:
        for variant, settings in BLOCKS.items():
            found.append(
                PolicyJob(
                    suite="metaworld",
                    variant=variant,
                    seed=seed,
                    tokenizer=BLOCKS_OF,
                    parts=("blocks",),
                    settings=settings,
                )
            )
    found += [
        PolicyJob(suite=suite, variant=t, seed=s, tokenizer=t, parts=("tokenizers",))
        for suite in SUITES
        if suite != "metaworld"
        for s in SEEDS
        for t in MAIN
    ]
    found += [
        PolicyJob(suite=suite.name, variant=t, seed=s, tokenizer=t, parts=("tokenizers",))
        for suite in SUITES.values()
        for s in suite.others
        for t in OTHERS
    ]
    return found


POLICY_JOBS: Mapping[str, PolicyJob] = {job.name: job for job in _jobs()}
