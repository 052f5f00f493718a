"""How a policy is trained: the settings of a run, and which of its parameters learn in which part of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from actok.core import ConfigError, build_config
from actok.training.config import TrainConfig

# What networks call their vision tower, and what leads from it into the decoder.
_VISION = r".*(?<![a-z])(stem|vision|visual|connector|multi_modal_projector)"
# Names of groups, and the parameters they stand for: "language" is the backbone without "vision", "expert" everything that is
# not the backbone's.
GROUPS = {
    "backbone": r"backbone\.",
    "language": rf"backbone\.(?!{_VISION})",
    "vision": rf"backbone\.{_VISION}",
    "embeddings": r"backbone\.(.*\.)?(table$|embed_tokens\.|lm_head\.)",
    "expert": r"(?!backbone\.)",
    "tokens": r"parts\.tokens\.",
    "flow": r"parts\.flow\.",
    "state": r"state_in\.",
}
# Settings of a run that mean nothing for a policy.
FOREIGN = {
    "quantise_after": "a policy's tokenizer is frozen",
    "anneal_codebooks": "a policy's tokenizer is frozen",
    "compile": "every step reads prompts as text, which torch.compile cannot follow",
}

__all__ = [
    "GROUPS",
    "PolicyTrainConfig",
    "Stage",
    "check_nothing_stays_random",
    "policy_train_config",
    "trained_names",
]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run.

    Attributes:
        share: of the steps.
        train: what learns in it, all else standing still: names of GROUPS, or regular expressions that match from the
            beginning of a parameter's name; "all": everything.
    """

    share: float
    train: tuple[str, ...] = ("all",)

    def __post_init__(self) -> None:
        share = self.share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(f"share of a stage is {share!r}; give a number above 0, at most 1")
        train = (self.train,) if isinstance(self.train, str) else self.train
        if not isinstance(train, (tuple, list)) or not train or not all(isinstance(t, str) for t in train):
            raise ConfigError(
                f"train of a stage is {self.train!r}; give names such as {', '.join(GROUPS)}, or regular expressions"
            )
        object.__setattr__(self, "train", tuple(train))
        for pattern in self.train:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"train of a stage has {pattern!r}, no regular expression ({error})") from None


@dataclass(frozen=True, kw_only=True)
class PolicyTrainConfig(TrainConfig):
    """`TrainConfig` of a policy: without the settings of codebooks and compilation, with stages.

    Attributes:
        stages: one after the other, their shares adding up to 1; none: everything learns all the time. FASTer (section
            3.2 and ablations) pretrains the action expert inside the vision-language model and then tunes both with part
            of it frozen; which part it does not say. With the vision tower as that part: stages = [{share = 0.3, train =
            ["expert"]}, {share = 0.7, train = ["expert", "language"]}].
        accumulate: parts that each process takes its share of a batch in, one after the other: their gradients are added up to
            that of the whole batch, in about a part's memory. The samples of a step stay the same.
    """

    stages: tuple[Stage, ...] = ()
    accumulate: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("accumulate", 1)
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be taken in {self.accumulate} parts of one size; let accumulate divide it"
            )
        for name, reason in FOREIGN.items():
            if getattr(self, name):
                raise ConfigError(f"{name} is no setting of a policy ({reason}); leave it out")
        given = self.stages
        if not isinstance(given, (tuple, list)) or not all(isinstance(s, (Stage, Mapping)) for s in given):
            raise ConfigError(f"stages are {given!r}; give tables of share and train")
        stages = tuple(s if isinstance(s, Stage) else build_config(Stage, s, "a stage") for s in given)
        if stages and abs(sum(s.share for s in stages) - 1) > 1e-6:
            told = ", ".join(f"{s.share:g}" for s in stages)
            raise ConfigError(f"the shares of the stages are {told}; let them add up to 1")
        if len(stages) > self.steps:
            raise ConfigError(f"{len(stages)} stages do not fit in {self.steps} steps; give more steps")
        object.__setattr__(self, "stages", stages)

    @property
    def starts(self) -> tuple[int, ...]:
        """First step of each stage; (0,) without stages. Every stage has a step at least."""
        found = [0]
        share = 0.0
        for number, stage in enumerate(self.stages[:-1], 1):
            share += stage.share
            latest = self.steps - (len(self.stages) - number)
            found.append(min(max(math.floor(share * self.steps + 0.5), found[-1] + 1), latest))
        return tuple(found)

    def stage_at(self, step: int) -> int:
        """Number, from 0, of the stage that a step belongs to."""
        return sum(start <= step for start in self.starts) - 1


def policy_train_config(preset: Mapping[str, Any], given: Mapping[str, Any], owner: str) -> PolicyTrainConfig:
    """The preset's [training] table with the caller's values on top. Raises ConfigError for an unknown one."""
    known = {f.name for f in fields(PolicyTrainConfig)}
    for name, reason in FOREIGN.items():
        if name in {**preset, **given} and name in known:
            raise ConfigError(f"training of {owner}: {name} is no setting of a policy ({reason}); leave it out")
    config: PolicyTrainConfig = build_config(PolicyTrainConfig, {**preset, **given}, f"training of {owner}")
    return config


def trained_names(policy: nn.Module, stages: Sequence[Stage]) -> list[frozenset[str]]:
    """Names of the parameters that each stage trains; one set of all of them without stages.

    What requires no gradient when the policy is made (layers of a backbone that nothing reads) is never trained.

    Raises ConfigError for a name or expression that stands for no parameter of this policy.
    """
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    if not stages:
        return [frozenset(names)]
    return [frozenset(n for pattern in stage.train for n in _matching(names, pattern)) for stage in stages]


def check_nothing_stays_random(policy: nn.Module, heads: Sequence[str], stages: Sequence[Stage]) -> None:
    """Raise ConfigError where the stages leave out what has only its first random weights: everything that is not the
    backbone's, and the rows of codes in the backbone's table where it emits them itself.
    """
    ever = frozenset().union(*trained_names(policy, stages))
    able = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    new = [n for n in able if re.match(GROUPS["expert"], n)]
    if "tokens" in heads and not any(re.match(GROUPS["tokens"], n) for n in able):
        new += [n for n in able if re.match(GROUPS["embeddings"], n)]
    if left := [n for n in new if n not in ever]:
        there = [group for group in ("tokens", "flow", "state", "embeddings") if re.match(GROUPS[group], left[0])]
        raise ConfigError(
            f"no stage trains {left[0]}, which would keep its first random weights; add {(there or ['expert'])[0]!r} to the"
            " train of a stage"
        )


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    if pattern == "all":
        return list(names)
    found = [n for n in names if re.match(GROUPS.get(pattern, pattern), n)]
    if not found:
        there = [group for group, expression in GROUPS.items() if any(re.match(expression, n) for n in names)]
        raise ConfigError(
            f"a stage trains {pattern!r}, which stands for no parameter of this policy; it has the groups"
            f" {', '.join(there) or 'none'}, and parameters such as {', '.join(names[:3])}"
        )
    return found
