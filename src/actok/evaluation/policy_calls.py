"""Calling a policy again and again: seeded draws, counts, and how long each stage takes, in batches and alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from actok.evaluation.latency import one_torch_thread
from actok.policies.base import Acted, Policy, PolicyObservation

# Observations of the rollout that are kept to time the policy on one at a time.
SINGLES = 32

__all__ = ["PolicyCalls", "policy_facts"]


class PolicyCalls:
    """A policy under measurement.

    The draws of call n come from a generator seeded by (seed, n), so a sequence of calls repeats exactly.
    """

    def __init__(self, policy: Policy, head: str, seed: int, deadline_s: float | None = None) -> None:
        self.policy, self.seconds = policy, 0.0
        self._head, self._seed, self._deadline_s = head, seed, deadline_s
        first = next(policy.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        self._sizes: list[int] = []
        self._passes: list[int] = []
        self._stages: list[dict[str, float]] = []
        self._clipped = 0
        self._beyond = 0
        # A uniform sample of all observations (Vitter 1985, algorithm R).
        self._kept: list[PolicyObservation] = []
        self._met = 0
        self._choice = np.random.default_rng([seed, SINGLES])

    def __call__(self, observation: PolicyObservation) -> Acted:
        """One call for a batch of observations."""
        acted, stages = self._act(observation, len(self._sizes))
        self.seconds += stages["total"]
        self._sizes.append(len(observation))
        self._passes.append(acted.passes)
        self._stages.append(stages)
        if acted.clipped is not None:
            self._clipped += int(np.sum(acted.clipped))
        if acted.state_beyond is not None:
            self._beyond += int(np.sum(acted.state_beyond))
        for b in range(len(observation)):
            self._keep(observation, b)
        return acted

    def counts(self) -> dict[str, Any]:
        """Calls, chunks, forward passes a chunk took, values moved back inside the limits of the action space."""
        chunks = sum(self._sizes)
        return {
            "calls": len(self._sizes),
            "chunks": chunks,
            "passes": float(np.dot(self._passes, self._sizes) / chunks),
            "clipped": self._clipped,
            "state_beyond": self._beyond,
        }

    def latency(self) -> dict[str, Any]:
        """Milliseconds by stage ("total" among them): of the batched calls, and of single observations on one thread.

        {batched: {n, mean_size, ms: {stage: {p50, p95}}, ms_per_chunk}, single: {n, ms}}. Single observations are a
        sample of those of the calls so far, each timed once after one call that warms up.
        """
        single = []
        with one_torch_thread():
            for number, observation in enumerate(self._kept[:1] + self._kept):
                single.append(self._act(observation, number)[1])
        return {
            "batched": {
                "n": len(self._stages),
                "mean_size": float(np.mean(self._sizes)),
                "ms": _quantiles(self._stages),
                "ms_per_chunk": 1e3 * self.seconds / sum(self._sizes),
            },
            "single": {"n": len(self._kept), "ms": _quantiles(single[1:])},
        }

    def _act(self, observation: PolicyObservation, number: int) -> tuple[Acted, dict[str, float]]:
        """What the policy does, and seconds by stage. Modules are in evaluation mode for the call."""
        state = np.random.SeedSequence([self._seed, number]).generate_state(1, np.uint64)
        generator = torch.Generator(self._device).manual_seed(int(state[0] >> np.uint64(1)))
        training = self.policy.training
        self.policy.eval()
        try:
            begin = time.perf_counter()
            with torch.no_grad():
                acted = self.policy.act(observation, head=self._head, generator=generator, deadline_s=self._deadline_s)
            total = time.perf_counter() - begin
        finally:
            self.policy.train(training)
        return acted, {**acted.seconds, "total": total}

    def _keep(self, observation: PolicyObservation, b: int) -> None:
        self._met += 1
        place = len(self._kept) if len(self._kept) < SINGLES else int(self._choice.integers(self._met))
        if place >= SINGLES:
            return
        one = PolicyObservation(
            instruction=[observation.instruction[b]],
            proprio=None if observation.proprio is None else observation.proprio[b : b + 1].copy(),
            images={view: images[b : b + 1].copy() for view, images in observation.images.items()},
        )
        self._kept[place : place + 1] = [one]


def policy_facts(policy: Policy) -> dict[str, Any]:
    """Which policy this is, as JSON values."""
    artifact = policy.tokenizer.to_artifact()
    return {
        "kind": type(policy).__name__,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "tokenizer": {"kind": policy.tokenizer.kind, "weights": artifact.weights_hash},
        "embodiment": policy.embodiment,
        "horizon": policy.horizon,
        "views": list(policy.views),
        "proprio": policy.proprio,
        "heads": list(policy.heads),
        "device": str(next((p.device for p in policy.parameters()), "cpu")),
        "precision": policy.precision,
        "decoding": dict(policy.decoding),
        "meta": dict(policy.meta),
    }


def _quantiles(stages: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """p50 and p95 in milliseconds by stage, in the order in which stages appear."""
    found = {}
    for name in dict.fromkeys(name for stage in stages for name in stage):
        values = 1e3 * np.array([stage.get(name, 0.0) for stage in stages])
        found[name] = {"p50": float(np.quantile(values, 0.5)), "p95": float(np.quantile(values, 0.95))}
    return found
