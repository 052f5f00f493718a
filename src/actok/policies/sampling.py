"""Drawing the codes of a block from logits, so that only what decodes can be drawn.

A tokenizer that is total binds each position to the codes of its table and nothing else, so a block is drawn at once. One
that is not total has a `Constraint`: then the positions of a block are drawn one after another, each from the codes after
which the sequence can still be completed. The logits of a block are those of one pass in both cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from actok.core import ConfigError, Constraint, TokenError, TokenLayout
from actok.policies.vocab import VocabularyMap

__all__ = ["SampledBlock", "SamplingConfig", "rows_of_places", "sample_block"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How codes are drawn. Defaults: FASTer's (arXiv 2512.04952, appendix).

    Attributes:
        temperature: logits are divided by it; 0: always the likeliest code (greedy).
        top_k: only so many of the likeliest admissible codes can be drawn; None: all.
    """

    temperature: float = 0.8
    top_k: int | None = 50

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature!r}; give a number of at least 0 (0: greedy)")
        if self.top_k is not None and (
            not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1
        ):
            raise ConfigError(f"top_k is {self.top_k!r}; give a whole number of at least 1, or None for all codes")


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledBlock:
    """The codes of one pass.

    Attributes:
        codes: int64 [B, n]; -1 after the end of a sequence.
        ids: int64 [B, n], the same as language-model ids; `VocabularyMap.end` after the end.
        log_probs: float32 [B, n], the model's log-probability of each code among those that may stand there, before
            temperature and top-k; 0 after the end.
        done: bool [B]: the sequence is complete.
        state: of the constraint, for the next block; None without one.
    """

    codes: Tensor
    ids: Tensor
    log_probs: Tensor
    done: Tensor
    state: np.ndarray | None


def sample_block(
    logits: Float[Tensor, "B n V"],
    layout: TokenLayout,
    vocab: VocabularyMap,
    *,
    start: int,
    config: SamplingConfig | None = None,
    constraint: Constraint | None = None,
    state: np.ndarray | None = None,
    generator: torch.Generator | None = None,
    first_id: int = 0,
) -> SampledBlock:
    """Draw the codes at positions start, ..., start + n - 1 of B sequences.

    Args:
        logits: over the language model's ids, any floating dtype; read at the ids of admissible codes only.
        layout, vocab: what may stand at each position, and where that is among the ids.
        config: None: FASTer's settings.
        constraint: `tokenizer.constraint(context)`; needed where the layout is not total.
        state: that of the block before; None where start is 0.
        generator: on any device; its draws are moved to the logits'.
        first_id: of the logits: they may be over the ids of this block's codes alone (`rows_of_places`).

    Raises ConfigError where an undecodable sequence could come out, or arguments do not belong together; TokenError for
    positions beyond the layout and logits that are not finite.
    """
    config = config or SamplingConfig()
    count, n, width = logits.shape
    if start < 0 or start + n > layout.max_len or not n:
        raise TokenError(
            f"positions {start} to {start + n - 1} were asked for, sequences of this layout have {layout.max_len} tokens;"
            " give logits of a block's own outputs (plan.emits)"
        )
    if constraint is None and not layout.total:
        raise ConfigError(
            "this layout has sequences that do not decode, and nothing keeps them from being drawn; give"
            " constraint=tokenizer.constraint(context)"
        )
    places = np.arange(start, start + n)
    ids, fits = _admissible(layout, vocab, places)
    low, high = int(ids.min()), int(ids.max()) + 1
    if first_id > low or first_id + width < high:
        raise TokenError(
            f"logits are over the ids {first_id} to {first_id + width - 1}, codes at these positions have {low} to"
            f" {high - 1}; give logits of all of them (a model with fewer ids is resized first)"
        )
    scores = _gather(logits, ids.to(logits.device) - first_id).float()
    fits = fits.to(logits.device)
    _check_finite(scores, fits, start)
    scores = scores.masked_fill(~fits, -torch.inf)
    if constraint is None:
        if state is not None:
            raise ConfigError("a state was given without its constraint; give both or neither")
        codes, log_probs = _draw(scores, config, generator)
        done = torch.full((count,), start + n == layout.max_len, device=logits.device)
    else:
        codes, log_probs, state = _draw_constrained(scores, config, constraint, state, start, generator)
        done = torch.from_numpy(constraint.done(state)).to(logits.device)
    ended = codes < 0
    found = ids.to(logits.device).expand(count, -1, -1).gather(2, codes.clamp(min=0)[..., None])[..., 0]
    return SampledBlock(
        codes=codes, ids=found.masked_fill(ended, vocab.end), log_probs=log_probs, done=done, state=state
    )


def rows_of_places(layout: TokenLayout, vocab: VocabularyMap, places: Int[np.ndarray, "n"]) -> slice:
    """The ids of all codes that may stand at these positions, from the lowest to the highest."""
    rows = [vocab.rows_of(int(table)) for table in np.unique(layout.table[places])]
    return slice(min(r.start for r in rows), max(r.stop for r in rows))


def _admissible(
    layout: TokenLayout, vocab: VocabularyMap, places: Int[np.ndarray, "n"]
) -> tuple[Int[Tensor, "1 n K"], Bool[Tensor, "n K"]]:
    """Ids of codes 0 to K - 1 at each place (K the most that any has), and which of them there are."""
    most = int(layout.vocab[places].max())
    codes = np.arange(most)[None]
    fits = codes < layout.vocab[places][:, None]
    known = np.where(fits, codes, 0)  # where there is no such code, any will do: it is never drawn
    ids = vocab.to_lm(known, layout, np.broadcast_to(places[:, None], known.shape))
    return torch.from_numpy(ids)[None], torch.from_numpy(fits)


def _gather(logits: Float[Tensor, "B n V"], ids: Int[Tensor, "1 n K"]) -> Float[Tensor, "B n K"]:
    return logits.gather(2, ids.expand(len(logits), -1, -1))


def _check_finite(scores: Float[Tensor, "B n K"], fits: Bool[Tensor, "n K"], start: int) -> None:
    bad = ~scores.isfinite() & fits
    if bool(bad.any()):
        b, i, code = bad.nonzero()[0].tolist()
        raise TokenError(
            f"the logit of code {code} at position {start + i} of sequence {b} is {float(scores[b, i, code])}"
            f" ({int(bad.sum())} such logits); look for the cause in the model, e.g. an overflow in half precision"
        )


def _draw(
    scores: Float[Tensor, "*batch K"], config: SamplingConfig, generator: torch.Generator | None
) -> tuple[Int[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """One code from each row, and its log-probability in the row; codes at -inf are never drawn."""
    if config.temperature == 0:
        codes = scores.argmax(-1)
    else:
        k = scores.shape[-1] if config.top_k is None else min(config.top_k, scores.shape[-1])
        best, where = scores.topk(k, -1)
        # The largest of logits plus Gumbel noise is a draw from their softmax (Gumbel, 1954), and -inf stays -inf.
        # Subtracting the row's largest first keeps a small temperature from overflowing.
        scaled = (best - best[..., :1]) / config.temperature
        device = best.device if generator is None else generator.device
        noise = torch.empty_like(best, device=device).exponential_(generator=generator).log().to(best.device)
        codes = where.gather(-1, (scaled - noise).argmax(-1, keepdim=True))[..., 0]
    return codes, scores.log_softmax(-1).gather(-1, codes[..., None])[..., 0]


def _draw_constrained(
    scores: Float[Tensor, "B n K"],
    config: SamplingConfig,
    constraint: Constraint,
    state: np.ndarray | None,
    start: int,
    generator: torch.Generator | None,
) -> tuple[Int[Tensor, "B n"], Float[Tensor, "B n"], np.ndarray]:
    """Position by position; -1 where the sequence is complete. Returns the constraint's new state too."""
    count, n, known = scores.shape
    if state is None:
        if start:
            raise ConfigError(f"no state was given for position {start}; give the state of the block before")
        state = constraint.start(count)
    if len(state) != count:
        raise ConfigError(
            f"the state is of {len(state)} sequences, the logits of {count}; give those of the same batch"
        )
    state = state.copy()
    codes = torch.full((count, n), -1, device=scores.device)
    log_probs = torch.zeros(count, n, device=scores.device)
    for i in range(n):
        active = np.flatnonzero(~constraint.done(state))
        if not len(active):
            break
        rows = torch.from_numpy(active).to(scores.device)
        here = scores[:, i] if len(active) == count else scores[rows, i]
        mask = constraint.allowed(state[active])[:, :known]
        if mask.shape[1] < known:
            mask = np.pad(mask, ((0, 0), (0, known - mask.shape[1])))
        masked = here.masked_fill(torch.from_numpy(~mask).to(scores.device), -torch.inf)
        if bool(masked.amax(-1).isneginf().any()):
            raise ConfigError(
                f"nothing may stand at position {start + i} that both layout and constraint admit; take both from one"
                " tokenizer, at the same horizon and embodiment"
            )
        codes[rows, i], log_probs[rows, i] = _draw(masked, config, generator)
        state[active] = constraint.advance(state[active], codes[rows, i].cpu().numpy())
    return codes, log_probs, state
