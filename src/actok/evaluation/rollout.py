"""Closed-loop evaluation: how often does a policy solve its tasks in simulation?

Each episode begins at a start state that is a pure function of (seed, task, number), so all policies face the same ones,
and none of them is a start state that `collect` records with the same seed. The policy sees the observation, gives a
chunk of actions, and all or some of these are executed before it looks again. An episode is a success at the first step
at which the environment reports success, and a failure at its step limit. A chunk that is not valid is never executed:
the episode ends there as a failure, and is counted.

The random draws of the policy come from a generator seeded by (seed, number of the call), and a call covers all live
episodes. So a result repeats exactly for the same seed, tasks, episodes and batch, whatever the number of processes is;
with another batch, draws (and roundings of batched arithmetic) fall otherwise.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actok.core import ActokError, ConfigError
from actok.envs import Env, Observation
from actok.evaluation.compatibility import cameras_of, check_environment, check_observation
from actok.evaluation.intervals import success_rates
from actok.evaluation.policy_calls import PolicyCalls, policy_facts
from actok.evaluation.trials import Decider, Trial, run_trials
from actok.evaluation.vector import Start, VectorEnv
from actok.policies.base import Policy, PolicyObservation

# Keeps the start states of rollouts apart from those of demonstrations of the same seed.
DOMAIN = int.from_bytes(b"roll", "big")
# Of a task; all are kept in memory to the end.
MOST_EPISODES = 1_000_000

__all__ = ["rollout", "start_seed", "training_tasks"]


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a rollout does, checked against its policy."""

    episodes: int
    seed: int
    head: str
    execute: int
    ensemble: float | None
    limit: float | None
    batch: int
    record: int
    deadline_ms: float | None

    def __post_init__(self) -> None:
        for name, least in (("episodes", 1), ("seed", 0), ("execute", 1), ("batch", 1), ("record", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least {least}")
        if self.episodes > MOST_EPISODES:
            raise ConfigError(f"episodes are {self.episodes}; give at most {MOST_EPISODES} of each task")
        if self.ensemble is not None and not 0 <= self.ensemble < math.inf:
            raise ConfigError(
                f"ensemble is {self.ensemble!r}; give a weight of at least 0 (ACT: 0.01), or leave it out"
            )
        if self.deadline_ms is not None and not 0 < self.deadline_ms < math.inf:
            raise ConfigError(f"deadline_ms is {self.deadline_ms!r}; give milliseconds above 0, or leave it out")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ConfigError(f"limit is {self.limit!r}; give a factor above 0, or inf for the environment's own limit")


def rollout(
    env: Env,
    policy: Policy,
    tasks: Sequence[str] | None = None,
    episodes: int = 10,
    *,
    cameras: Mapping[str, str] | None = None,
    seed: int = 0,
    head: str | None = None,
    execute: int | None = None,
    ensemble: float | None = None,
    limit: float | None = 1.5,
    deadline_ms: float | None = None,
    batch: int = 16,
    workers: int = 2,
    record: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Success of a policy on `episodes` episodes of each task, as JSON values (docs/policies/rollout.md).

    Args:
        env: made with the policy's views.
        policy: of the environment's action space and rate.
        tasks: None: those of the policy's training data that the environment has, by name or else by their words (data
            that call a task by its instruction).
        episodes: of each task.
        cameras: view of the policy -> view of the environment, where their names differ; see
            `actok.evaluation.compatibility.cameras_of`.
        seed: of start states and draws.
        head: of `policy.heads`; None: the first.
        execute: steps of each chunk that are executed; None: the whole chunk.
        ensemble: temporal ensembling (ACT, arXiv 2304.13705, algorithm 2): a chunk at every step, and of all that were
            predicted for this step the average with weights exp(-ensemble * i), i = 0 the oldest; None: off. Every
            number is averaged by itself, rotations too.
        limit: an episode ends after this many times the mean length of the task's training demonstrations
            (policy.meta["task_steps"]), at most env.max_steps; env.max_steps where that is unknown or limit is None or inf.
        deadline_ms: of a call, which then emits codes until the first prefix that decodes after that time (tokenizers with
            prefixes, e.g. oat). What comes out depends on the machine and does not repeat.
        batch: live episodes, and so observations of a policy call.
        workers: processes; in a script, more than one, or `record`, needs the guard `if __name__ == "__main__":`.
        record: episodes of which to write pictures into `out`, successes and failures in turn.
        out: folder of the pictures.
        progress: a bar on stderr.

    Raises SpaceMismatchError where action space, rate, proprioception or views are not the policy's, ConfigError for
    unknown tasks, heads and settings.
    """
    limit = None if limit == math.inf else limit
    check_environment(policy, env)
    lengths = _lengths_here(env, policy)
    names = _tasks(env, policy, tasks, lengths)
    shown = cameras_of(policy, cameras)
    chosen = _Settings(
        episodes=episodes,
        seed=seed,
        head=_head(policy, head),
        execute=_executed(policy, execute, ensemble),
        ensemble=ensemble,
        limit=limit,
        batch=batch,
        record=record,
        deadline_ms=deadline_ms,
    )
    _check_deadline(policy, chosen)
    if policy.space.embodiment != env.space.embodiment:
        warnings.warn(
            f"the policy was trained on {policy.space.embodiment!r} and environment {env.name!r} is {env.space.embodiment!r}:"
            " the same action space, perhaps another robot",
            stacklevel=2,
        )
    if env.starts is not None and episodes > env.starts:
        warnings.warn(
            f"a task of environment {env.name!r} has {env.starts} start states, so {episodes} episodes repeat some; the"
            " confidence interval takes them for independent",
            stacklevel=2,
        )
    if record:
        from actok.evaluation.filming import check_filming

        check_filming(env, out)
    trials = [
        Trial(
            start=Start(task=task, seed=_start_seed(env, seed, task, number)),
            number=number,
            limit=_step_limit(env, lengths.get(task), limit),
            instruction=env.instruction(task),
        )
        for task in names
        for number in range(episodes)
    ]
    calls = PolicyCalls(policy, chosen.head, seed, None if deadline_ms is None else deadline_ms / 1e3)
    begin = time.perf_counter()
    with VectorEnv(env, min(batch, len(trials)), workers) as vector, _bar(len(trials), progress) as bar:
        run_trials(vector, trials, _Acting(calls, chosen, shown, env), lambda _: bar.update())
    seconds = time.perf_counter() - begin
    result = {
        "env": {"name": env.name, "options": env.options_as_json(), "max_steps": env.max_steps, "rate_hz": env.rate_hz},
        "cameras": shown,
        "policy": policy_facts(policy),
        "seed": seed,
        "head": chosen.head,
        "execute": chosen.execute,
        "ensemble": ensemble,
        "limit": limit,
        "deadline_ms": deadline_ms,
        "batch": batch,
        **_outcome(trials),
        **calls.counts(),
        "latency": calls.latency(),
        "seconds": {"total": seconds, "policy": calls.seconds, "simulation": seconds - calls.seconds},
    }
    if record:
        from actok.evaluation.filming import film_some

        assert out is not None, "checked above"
        try:
            result["recordings"] = film_some(env, trials, record, Path(out), workers=workers)
        except ActokError as error:  # no OpenGL, mostly: what was measured must not be lost over pictures
            warnings.warn(f"nothing was filmed: {error}", stacklevel=2)
            result["recordings"] = []
    return result


def start_seed(seed: int, task: str, number: int) -> int:
    """The environment's seed of an episode: a pure function of these three, apart from those of recording."""
    sequence = np.random.SeedSequence([DOMAIN, seed, zlib.crc32(task.encode()), number])
    return int(sequence.generate_state(1)[0])


def _start_seed(env: Env, seed: int, task: str, number: int) -> int:
    """As `start_seed`; where start states are a list, consecutive ones, so that none comes twice before all came once."""
    return start_seed(seed, task, number) if env.starts is None else start_seed(seed, task, 0) + number


def training_tasks(policy: Policy) -> Mapping[str, float]:
    """Task -> mean length in steps of the demonstrations that the policy was trained on; empty where unknown."""
    return dict(policy.meta.get("task_steps") or {})


class _Acting(Decider):
    """A policy's chunks, whole, in part, or averaged over time."""

    def __init__(self, calls: PolicyCalls, settings: _Settings, cameras: Mapping[str, str], env: Env) -> None:
        self._calls, self._settings, self._cameras, self._env = calls, settings, cameras, env
        self._chunks: dict[int, list[tuple[int, np.ndarray]]] = {}  # by slot: (step at which it was predicted, [T, D])
        self._checked = False

    def decide(self, live: Mapping[int, Trial], seen: Mapping[int, Observation]) -> dict[int, np.ndarray | str]:
        """See Decider.decide."""
        if not self._checked:
            for observation in seen.values():
                check_observation(self._calls.policy, self._cameras, observation, self._env)
            self._checked = True
        acted = self._calls(_stacked(self._calls.policy, self._cameras, live, seen))
        decided: dict[int, np.ndarray | str] = {}
        for b, (slot, trial) in enumerate(live.items()):
            if not acted.valid[b]:
                decided[slot] = acted.reasons[b] or "not valid"
            elif self._settings.ensemble is None:
                decided[slot] = acted.actions[b, : self._settings.execute]
            else:
                decided[slot] = self._averaged(slot, trial.steps, acted.actions[b], self._settings.ensemble)
        return decided

    def forget(self, slot: int) -> None:
        """See Decider.forget."""
        self._chunks.pop(slot, None)

    def _averaged(self, slot: int, now: int, chunk: np.ndarray, weight: float) -> np.ndarray:
        """[1, D]: of every chunk that reaches this step, the action for it, the oldest first."""
        kept = [(begun, c) for begun, c in self._chunks.get(slot, []) if now - begun < len(c)]
        self._chunks[slot] = [*kept, (now, chunk)]
        there = np.stack([c[now - begun] for begun, c in self._chunks[slot]]).astype(np.float64)
        shares = np.exp(-weight * np.arange(len(there)))
        return ((shares / shares.sum()) @ there)[None].astype(np.float32)


def _stacked(
    policy: Policy, cameras: Mapping[str, str], live: Mapping[int, Trial], seen: Mapping[int, Observation]
) -> PolicyObservation:
    observations = [seen[slot] for slot in live]
    return PolicyObservation(
        instruction=[trial.instruction for trial in live.values()],
        proprio=np.stack([o.proprio for o in observations]).astype(np.float32) if policy.proprio else None,
        images={view: np.stack([o.images[camera] for o in observations]) for view, camera in cameras.items()},
    )


# -- settings ---------------------------------------------------------------------------------------------------------


def _lengths_here(env: Env, policy: Policy) -> dict[str, float]:
    """Task of the environment -> mean length of its training demonstrations, of those that the policy was trained on.

    Data may call a task as the environment does, or by the words of its instruction, which several tasks can share.
    """
    trained = training_tasks(policy)
    here = {task: steps for task, steps in trained.items() if task in env.tasks}
    if len(here) < len(trained):
        words = {task: env.instruction(task) for task in env.tasks if task not in here}
        here |= {task: trained[text] for task, text in words.items() if text in trained and text not in here}
    return here


def _tasks(env: Env, policy: Policy, tasks: Sequence[str] | None, here: Mapping[str, float]) -> list[str]:
    if tasks is None:
        trained = training_tasks(policy)
        if not here:
            raise ConfigError(
                f"environment {env.name!r} has none of the tasks that the policy was trained on, neither by name nor by"
                f" instruction ({_some(list(trained)) or 'it names none'}); name tasks"
            )
        known = {*here, *(env.instruction(task) for task in here)}
        if missing := [task for task in trained if task not in known]:
            warnings.warn(
                f"the policy was also trained on {_some(missing)}, which environment {env.name!r} does not have",
                stacklevel=3,
            )
        return list(here)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    for task in names:
        env.check_task(task)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"tasks are {names}; name at least one, each once")
    return names


def _head(policy: Policy, head: str | None) -> str:
    name = policy.heads[0] if head is None else head
    if name not in policy.heads:
        raise ConfigError(f"the policy has no head {name!r}; it has {', '.join(policy.heads)}")
    return name


def _executed(policy: Policy, execute: int | None, ensemble: float | None) -> int:
    if ensemble is not None:
        if execute not in (None, 1):
            raise ConfigError(f"execute is {execute} with temporal ensembling, which predicts at every step; give one")
        return 1
    if execute is not None and isinstance(execute, int) and execute > policy.horizon:
        raise ConfigError(
            f"execute is {execute}, but the policy's chunks have {policy.horizon} steps; give at most that"
        )
    return policy.horizon if execute is None else execute


def _check_deadline(policy: Policy, chosen: _Settings) -> None:
    layout = policy.tokenizer.layout_for(policy.horizon, policy.embodiment)
    if chosen.deadline_ms is not None and (chosen.head == "flow" or not layout.prefixes):
        what = "the flow head has" if chosen.head == "flow" else f"tokens of {policy.tokenizer.kind!r} have"
        raise ConfigError(
            f"deadline_ms is {chosen.deadline_ms:g}, but {what} no action before the last pass; leave it out, or take a"
            " tokenizer with prefixes (oat)"
        )


def _some(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _step_limit(env: Env, usual: float | None, limit: float | None) -> int:
    if limit is None or usual is None:
        return env.max_steps
    return max(1, min(env.max_steps, math.ceil(limit * usual)))


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="episode", desc="rollout", file=sys.stderr, delay=2, disable=not progress)


# -- what came of it --------------------------------------------------------------------------------------------------


def _outcome(trials: Sequence[Trial]) -> dict[str, Any]:
    success = np.array([trial.success for trial in trials])
    rates = success_rates(success, [trial.task for trial in trials])
    for task, row in rates["per_task"].items():
        mine = [trial for trial in trials if trial.task == task]
        row["invalid"] = sum(trial.invalid is not None for trial in mine)
        row["limit"] = mine[0].limit
        row["steps_to_success"] = _mean([trial.steps for trial in mine if trial.success])
    return {
        **rates,
        "invalid": sum(trial.invalid is not None for trial in trials),
        "steps_to_success": _mean([trial.steps for trial in trials if trial.success]),
        "steps": sum(trial.steps for trial in trials),
        "episodes": [
            {
                "task": trial.task,
                "number": trial.number,
                "seed": trial.start.seed,
                "success": trial.success,
                "steps": trial.steps,
                "calls": trial.calls,
                "invalid": trial.invalid,
            }
            for trial in trials
        ],
    }


def _mean(values: Sequence[int]) -> float | None:
    return float(np.mean(values)) if values else None
