"""What goes into a policy and what comes out, whatever its backbone and heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from actok.core import ActionSpace, ActionTokenizer, ConfigError
from actok.policies.precision import check_precision

__all__ = ["Acted", "Policy", "PolicyBatch", "PolicyObservation"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyObservation:
    """B robots' observations at one moment.

    Attributes:
        instruction: B texts.
        proprio: float32 [B, P] in the data set's raw units, or None where there is none.
        images: view name -> uint8 [B, H, W, 3].
    """

    instruction: Sequence[str]
    proprio: Float[np.ndarray, "B P"] | None = None
    images: Mapping[str, Shaped[np.ndarray, "..."]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.instruction)


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyBatch:
    """B training samples: observations, and the chunks that begin there.

    Attributes:
        observation: what the policy sees.
        actions: float32 [B, T, D], normalised by the tokenizer.
        real: bool [B, T], False beyond the episode's end.
        codes: int64 [B, N], the tokenizer's ids of these chunks; -1 behind the end where the length varies.
        text: what the policy is to say before it acts (the sub-task in force), B texts; None: nothing.
        after: what it is to say behind the codes (the sub-task in force when the chunk is over), B texts; None: nothing.
    """

    observation: PolicyObservation
    actions: Float[Tensor, "B T D"]
    real: Bool[Tensor, "B T"]
    codes: Int[Tensor, "B N"]
    text: Sequence[str] | None = None
    after: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.observation)

    def to(self, device: Any) -> PolicyBatch:
        """The same batch with its tensors on another device."""
        return replace(self, actions=self.actions.to(device), real=self.real.to(device), codes=self.codes.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Acted:
    """Chunks of actions for B observations.

    Attributes:
        actions: float32 [B, T, D] in raw units; NaN where `valid` is False.
        valid: bool [B].
        reasons: one entry per chunk; None where valid.
        passes: forward passes that emitted the action (of backbone or expert), prefix excluded.
        codes: int64 [B, n] that were emitted, -1 behind a sequence's end; None from a head that emits none.
        text: what the policy said before it acted, B texts ("" where nothing).
        text_after: what it said behind the codes, likewise.
        seconds: wall-clock time by stage: "images", "prefix", "actions", "decode", and "text_after" where words follow.
        clipped: int64 [B], values moved back inside the limits of the action space.
        state_beyond: int64 [B], numbers of the state outside the range that the policy was trained on; None where it reads
            none. As text they are read as the first or the last bin, as a vector as they are.
    """

    actions: Float[np.ndarray, "B T D"]
    valid: Bool[np.ndarray, "B"]
    reasons: Sequence[str | None]
    passes: int
    codes: Int[np.ndarray, "B n"] | None = None
    text: Sequence[str] = ()
    text_after: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    clipped: Int[np.ndarray, "B"] | None = None
    state_beyond: Int[np.ndarray, "B"] | None = None


class Policy(nn.Module, ABC):
    """From observations to chunks of actions, through a frozen tokenizer's codes or beside them.

    Attributes:
        tokenizer: frozen; its normaliser is the policy's.
        embodiment: of the tokenizer, whose action space the policy's actions are of.
        horizon: T of the chunks.
        views: names of the cameras it looks through, in order; () for none.
        proprio: P, or 0 where it does not read the state.
        meta: facts for a reader: data, split, training, demonstration length by task ("task_steps").
        precision: in which it computes when it acts, of `actok.policies.precision.PRECISIONS`.
    """

    tokenizer: ActionTokenizer
    embodiment: str
    horizon: int
    views: tuple[str, ...]
    proprio: int
    meta: Mapping[str, Any]
    precision: str = "float32"

    @property
    def space(self) -> ActionSpace:
        """What its actions mean."""
        return self.tokenizer.spaces[self.embodiment]

    @property
    @abstractmethod
    def heads(self) -> tuple[str, ...]:
        """Names that `act` takes; the first is its default."""

    @property
    def decoding(self) -> Mapping[str, Any]:
        """Settings of how it draws its actions, which no weight depends on, by name; this default has none."""
        return {}

    def with_decoding(self, **settings: Any) -> Self:
        """The same policy, drawing its actions by these settings from now on: some of those that `decoding` names.

        Raises ConfigError for another setting, with the list, and for a value that cannot be.
        """
        for name in settings:
            if name not in self.decoding:
                known = ", ".join(self.decoding) or "nothing"
                raise ConfigError(
                    f"{name} is not to be set when this policy acts, only {known}; train another one for it"
                )
        return self

    def with_precision(self, precision: str) -> Self:
        """The same policy, acting in this precision from now on: "float32" or, where it can, "bf16".

        Raises ConfigError for one that there is not, or that this policy cannot act in; this default knows float32 alone.
        """
        if check_precision(precision) != self.precision:
            raise ConfigError(f"this policy acts in {self.precision} only, not in {precision}; leave it out")
        return self

    @abstractmethod
    def losses(self, batch: PolicyBatch) -> Mapping[str, Tensor]:
        """Weighted losses by name; their sum is trained."""

    def terms(self, batch: PolicyBatch) -> Mapping[str, int]:
        """Of how many terms each loss of `losses` is the mean in this batch, by name; one that is left out: of its samples.

        So the losses of parts of a batch add up to those of the whole. This default leaves out all.
        """
        return {}

    def report(self) -> Mapping[str, float]:
        """What the last `losses` outside training noted beside the losses, by name: e.g. the accuracy of codes."""
        return {}

    def forward(self, batch: PolicyBatch) -> Mapping[str, Tensor]:
        """`losses`: what data-parallel wrappers call."""
        return self.losses(batch)

    @abstractmethod
    def act(
        self,
        observation: PolicyObservation,
        *,
        head: str | None = None,
        generator: torch.Generator | None = None,
        deadline_s: float | None = None,
    ) -> Acted:
        """Chunks for these observations.

        Args:
            head: one of `heads`; None: the first.
            generator: of the draws, on any device; None: torch's own.
            deadline_s: stop emitting codes at the first decodable prefix after that time (tokenizers with prefixes).

        Raises ConfigError for an unknown head, DataError for observations that are not what the policy was trained on.
        """

    @abstractmethod
    def save_pretrained(self, folder: Any) -> Any:
        """Write everything that `load_policy` needs, atomically: weights, tokenizer, vocabulary map, text tokenizer."""
