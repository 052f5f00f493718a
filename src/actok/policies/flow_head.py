"""Continuous actions by flow matching, from an expert that reads the backbone's keys and values.

Source: pi0 (arXiv 2410.24164, section IV and appendix B): action expert, linear path from noise to the chunk, the velocity
regressed, noise levels drawn from a shifted Beta distribution, ten Euler steps. That its gradient may be kept out of the
backbone, while codes train that, is knowledge insulation (pi0.5-KI, arXiv 2505.23705).
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from actok.backbones.decoder import DecoderBackbone
from actok.core import ActionTokenizer, ChunkContext
from actok.policies.base import PolicyBatch
from actok.policies.expert import Expert
from actok.policies.heads import Emitted, Head, Seen

# pi0's noise levels: 1 - t ~ Beta(1.5, 1) up to .999, where t = 0 is noise: most draws are noisy.
BETA, MOST_TIME = 1.5, 0.999
# Wavelengths of the sinusoids of t.
SHORTEST, LONGEST = 4e-3, 4.0

__all__ = ["FlowHead"]


class FlowHead(Head):
    """Velocity field over normalised chunks.

    Args:
        backbone: whose cache the expert reads.
        tokenizer, horizon, embodiment: whose normaliser the actions are in; its codes play no part here.
        width: of the expert.
        steps: of Euler's method when acting.
    """

    def __init__(
        self,
        backbone: DecoderBackbone,
        tokenizer: ActionTokenizer,
        *,
        horizon: int,
        embodiment: str,
        width: int,
        steps: int,
    ) -> None:
        super().__init__()
        self.tokenizer, self.horizon, self.embodiment, self.steps = tokenizer, horizon, embodiment, steps
        self.space = tokenizer.spaces[embodiment]
        self.expert = Expert(backbone, width)
        self.into = nn.Linear(self.space.dim, width)
        self.mix = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.out = nn.Linear(width, self.space.dim)

    def losses(self, seen: Seen, batch: PolicyBatch) -> dict[str, Tensor]:
        """{"flow": mean squared error of the velocity a - noise, over real steps}."""
        actions = batch.actions
        uniform = torch.rand(len(batch), device=actions.device)
        moment = MOST_TIME * (1 - uniform ** (1 / BETA))  # the inverse of Beta(1.5, 1)'s distribution function
        noise = torch.randn_like(actions)
        mixed = torch.lerp(noise, actions, moment[:, None, None])
        error = (self.velocity(seen, mixed, moment).float() - (actions - noise)) ** 2
        return {"flow": (error * batch.real[..., None]).sum() / (batch.real.sum() * actions.shape[-1])}

    def velocity(self, seen: Seen, mixed: Float[Tensor, "B T D"], moment: Float[Tensor, "B"]) -> Float[Tensor, "B T D"]:
        """d chunk / dt at time t of each sample (0 noise, 1 data). The steps of a chunk see each other."""
        count, steps = mixed.shape[:2]
        x = self.into(mixed)
        when = _sinusoids(moment, x.shape[-1]).to(x.dtype)[:, None].expand(-1, steps, -1)
        x = self.mix(torch.cat([x, when], -1)).to(mixed.dtype)  # under autocast too, the layers' sum is in float32
        places = seen.next_position[:, None] + torch.arange(steps, device=x.device)
        mask = F.pad(seen.real[:, None].expand(-1, steps, -1), (0, steps), value=True)
        assert mask.shape == (count, steps, seen.cache.length + steps)
        hidden, _ = self.expert.run(x, places, mask, seen.cache)
        return self.out(hidden)

    def act(self, seen: Seen, *, generator: torch.Generator | None, deadline: float | None) -> Emitted:
        """Integrate from noise to a chunk. Actions beyond the limits of the action space are moved to them and counted.

        A deadline changes nothing: before the last step there is no action.
        """
        begin = time.perf_counter()
        shape = (len(seen), self.horizon, self.space.dim)
        device = "cpu" if generator is None else generator.device
        x = torch.randn(shape, generator=generator, device=device).to(seen.real.device)
        for step in range(self.steps):
            x = x + self.velocity(seen, x, x.new_full((len(seen),), step / self.steps)) / self.steps
        integrated = time.perf_counter()
        context = ChunkContext(horizon=self.horizon, embodiment=self.embodiment, anchor=seen.anchor)
        raw = np.asarray(self.tokenizer.denormalise(x.float().cpu().numpy(), context), np.float32)
        finite = np.asarray(np.isfinite(raw).all((1, 2)))
        low = -np.inf if self.space.low is None else np.asarray(self.space.low, np.float32)
        high = np.inf if self.space.high is None else np.asarray(self.space.high, np.float32)
        limited = np.clip(raw, low, high)
        clipped = (limited != raw).sum((1, 2)) * finite
        limited[~finite] = np.nan
        return Emitted(
            actions=limited,
            valid=finite,
            reasons=[None if ok else "the flow diverged: its result is not finite" for ok in finite],
            passes=self.steps,
            codes=None,
            seconds={"actions": integrated - begin, "decode": time.perf_counter() - integrated},
            clipped=clipped.astype(np.int64),
        )


def _sinusoids(moment: Float[Tensor, "B"], width: int) -> Float[Tensor, "B {width}"]:
    """Sines and cosines of t at wavelengths from `SHORTEST` to `LONGEST`, evenly spaced in their logarithm."""
    share = torch.linspace(0, 1, -(-width // 2), device=moment.device)
    angle = moment[:, None] * 2 * math.pi / (SHORTEST * (LONGEST / SHORTEST) ** share)
    return torch.cat([angle.sin(), angle.cos()], -1)[:, :width]
