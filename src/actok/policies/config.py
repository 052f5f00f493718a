"""What a policy is, beside its backbone and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from actok.core import ConfigError
from actok.policies.prompt import STATE_FORMS
from actok.policies.sampling import SamplingConfig
from actok.policies.vocab import KINDS

# Settings of how actions are drawn, which no weight depends on, and the head whose actions they are.
DECODING = {"temperature": "tokens", "top_k": "tokens", "flow_steps": "flow"}

__all__ = ["DECODING", "VLAConfig"]


@dataclass(frozen=True, kw_only=True)
class VLAConfig:
    """What a policy is, beside its backbone and its tokenizer.

    Attributes:
        heads: "tokens", "flow" or both; the first is what `act` uses unless told otherwise.
        block: codes of a pass; None: the tokenizer's own blocks.
        spacing: k of the random spacing of code positions, even (FASTer: 2); 0: none.
        state: how proprioception is read: "text" (whole numbers in the prompt, as in FASTer), "vector" (one embedding,
            as in pi0) or "none".
        state_bins: whole numbers of "text".
        vocabulary: where codes live among the backbone's ids: "added", "tail" or "range" (`VocabularyMap`). An action expert
            has a table of its own: with `token_expert` these ids are those of codes that are read (`concludes`).
        reserved: ids left alone above a "tail", counted from the last row of the backbone's table, padding included. (openpi
            leaves 128 above its codes on PaliGemma; transformers' PaliGemma has 64 rows more, so that there it is 192.)
        id_range: first id of a "range", and the one behind its last.
        token_expert: width of the action expert that emits codes; 0: the backbone emits them itself.
        flow_expert: width of the flow-matching expert.
        flow_steps: Euler steps when acting.
        insulate: no gradient from the flow-matching expert into the backbone.
        token_weight, flow_weight: of the losses.
        speaks: the policy says the sub-task in words before it acts.
        concludes: the policy says in words, behind the codes that it emitted, what comes after them.
        temperature, top_k: of sampled codes; 0: the likeliest, 0: all.
    """

    heads: tuple[str, ...] = ("tokens",)
    block: int | None = None
    spacing: int = 2
    state: str = "text"
    state_bins: int = 256
    vocabulary: str = "added"
    reserved: int = 0
    id_range: tuple[int, int] | None = None
    token_expert: int = 0
    flow_expert: int = 0
    flow_steps: int = 10
    insulate: bool = False
    token_weight: float = 1.0
    flow_weight: float = 1.0
    speaks: bool = False
    concludes: bool = False
    temperature: float = 0.8
    top_k: int = 50

    def __post_init__(self) -> None:
        heads = (self.heads,) if isinstance(self.heads, str) else self.heads
        if not heads or len(set(heads)) != len(heads) or not set(heads) <= {"tokens", "flow"}:
            raise ConfigError(f"heads are {self.heads!r}; give tokens, flow or both, the default one first")
        object.__setattr__(self, "heads", tuple(heads))
        if self.state not in STATE_FORMS:
            raise ConfigError(f"state is {self.state!r}; choose one of {', '.join(STATE_FORMS)}")
        self._check_vocabulary()
        for name, least in (
            ("state_bins", 2),
            ("reserved", 0),
            ("token_expert", 0),
            ("flow_expert", 0),
            ("flow_steps", 1),
            ("top_k", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least {least}")
        if "flow" in heads and not self.flow_expert:
            raise ConfigError("the flow head has no expert; give flow_expert, its width (e.g. half of the backbone's)")
        for name in ("token_weight", "flow_weight", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ConfigError(f"{name} is {value!r}; give a number of at least 0")
        for name in ("insulate", "speaks", "concludes"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give true or false")
        for name, reason in (("speaks", "which says when words end"), ("concludes", "whose codes the words follow")):
            if getattr(self, name) and "tokens" not in heads:
                raise ConfigError(f"{name} needs the head tokens, {reason}; add it, or leave {name} out")
        SamplingConfig(temperature=self.temperature, top_k=self.top_k or None)

    def _check_vocabulary(self) -> None:
        if self.vocabulary not in KINDS:
            raise ConfigError(f"vocabulary is {self.vocabulary!r}; choose one of {', '.join(KINDS)}")
        if (self.vocabulary == "range") != (self.id_range is not None):
            raise ConfigError(
                f"vocabulary is {self.vocabulary!r} and id_range {self.id_range!r}; give both vocabulary=range and id_range,"
                " first id and the one behind the last, e.g. id_range=[256000,257000]"
            )
        if self.id_range is not None:
            given = self.id_range
            if not isinstance(given, (tuple, list)) or len(given) != 2 or not all(type(i) is int for i in given):
                raise ConfigError(
                    f"id_range is {given!r}; give two whole numbers, first id and the one behind the last"
                )
            object.__setattr__(self, "id_range", tuple(given))
        if self.reserved and self.vocabulary != "tail":
            raise ConfigError(
                f"reserved is {self.reserved} and vocabulary {self.vocabulary!r}; only a tail has ids above it"
            )
        if self.vocabulary != "added" and self.token_expert and not self.concludes:
            raise ConfigError(
                f"vocabulary is {self.vocabulary!r} with token_expert={self.token_expert}: an action expert emits codes of a"
                " table of its own, so that no code would have such an id; set token_expert=0 (the backbone then emits the"
                " codes), or vocabulary=added"
            )

    @property
    def sampling(self) -> SamplingConfig:
        """How codes are drawn."""
        return SamplingConfig(temperature=self.temperature, top_k=self.top_k or None)
