"""Episodes in simulation that are decided chunk by chunk, many at a time, whoever decides.

In each round every live episode gets the actions that it executes before its next decision; those that end (solved, out
of steps, or undecided) make room for the next ones. What is decided sees all live episodes at once, so that it can be a
batched call of a policy or of a tokenizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from actok.envs import Observation
from actok.evaluation.vector import Start, VectorEnv

__all__ = ["Decider", "Trial", "run_trials"]


@dataclass(kw_only=True, eq=False)
class Trial:
    """An episode: what it is, and how it went so far.

    Attributes:
        start: task and start state.
        number: of the episode within its task, or in its dataset.
        limit: steps after which it is a failure.
        instruction: the task in words.
        success, steps: whether it was solved, and after how many steps it ended.
        invalid: why it could not go on, in words; None where it could. It is then a failure.
        calls: decisions taken.
        executed: the actions, float32 [k, D] a decision.
    """

    start: Start
    number: int
    limit: int
    instruction: str
    success: bool = False
    steps: int = 0
    invalid: str | None = None
    calls: int = 0
    executed: list[np.ndarray] = field(default_factory=list)

    @property
    def task(self) -> str:
        """Its task."""
        return self.start.task

    @property
    def actions(self) -> np.ndarray:
        """float32 [steps, D]: all that was executed; [0, 0] where nothing was."""
        return np.concatenate(self.executed) if self.executed else np.zeros((0, 0), np.float32)


class Decider(ABC):
    """Who decides what is executed."""

    @abstractmethod
    def decide(self, live: Mapping[int, Trial], seen: Mapping[int, Observation]) -> Mapping[int, np.ndarray | str]:
        """For each live slot, actions [k, D] with k >= 1, or a reason in words why there are none."""

    def forget(self, slot: int) -> None:  # noqa: B027 - most remember nothing between decisions
        """The slot's episode is over."""


def run_trials(
    vector: VectorEnv, trials: Iterable[Trial], decider: Decider, done: Callable[[Trial], object] = lambda _: None
) -> None:
    """Run all trials to their end, in order, and fill in how they went; `done` is called with each that has ended.

    An undecided trial (a sequence that did not decode) is a failure at that step, and nothing of it is executed. What
    comes out does not depend on the number of processes.
    """
    waiting = iter(trials)
    live: dict[int, Trial] = {}
    seen: dict[int, Observation] = {}

    def end(slot: int) -> None:
        decider.forget(slot)
        seen.pop(slot, None)
        done(live.pop(slot))

    while True:
        starts = {}
        for slot in range(vector.slots):
            if slot not in live and (trial := next(waiting, None)) is not None:
                live[slot] = trial
                starts[slot] = trial.start
        if not live:
            return
        live = {slot: live[slot] for slot in sorted(live)}
        seen |= vector.reset(starts)
        decided = decider.decide(live, {slot: seen[slot] for slot in live})
        moves: dict[int, np.ndarray] = {}
        for slot, trial in live.items():
            trial.calls += 1
            actions = decided[slot]
            if isinstance(actions, str):
                trial.invalid = actions
            else:
                moves[slot] = actions[: trial.limit - trial.steps]
        for slot, moved in vector.step(moves).items():
            trial = live[slot]
            trial.executed.append(np.array(moves[slot][: moved.steps], np.float32))
            trial.steps += moved.steps
            trial.success = moved.success
            if moved.observation is not None:
                seen[slot] = moved.observation
        for slot, trial in list(live.items()):
            if trial.success or trial.invalid is not None or trial.steps >= trial.limit:
                end(slot)
