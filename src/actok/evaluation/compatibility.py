"""Whether a policy belongs in an environment, and which of its views shows what the policy looks at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from actok.core import ConfigError, SpaceMismatchError
from actok.envs import Env, Observation, env_class, list_envs, option_names
from actok.policies.base import Policy

LEROBOT_IMAGES = "observation.images."

__all__ = ["cameras_of", "check_environment", "check_observation"]


def cameras_of(policy: Policy, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """View of a policy -> view of an environment that shows it: as given, else the one of the same name.

    The prefix "observation.images.", which views carry where the data came from a LeRobot folder, tells nothing: it is
    left out of the environment's names, and may be left out of those given. Raises ConfigError for a view that the policy
    does not have, or that is given twice.
    """
    known = [view.removeprefix(LEROBOT_IMAGES) for view in policy.views]
    chosen: dict[str, str] = {}
    for view, camera in (given or {}).items():
        short = view.removeprefix(LEROBOT_IMAGES)
        if short not in known:
            raise ConfigError(
                f"cameras name {view!r}, which the policy does not look through; its views: {', '.join(known) or 'none'}"
            )
        if short in chosen:
            raise ConfigError(f"cameras name the view {short!r} twice; name it once")
        chosen[short] = camera
    return {view: chosen.get(short, short) for view, short in zip(policy.views, known, strict=True)}


def check_environment(policy: Policy, env: Env) -> None:
    """Raise SpaceMismatchError where a policy does not belong in an environment, with what differs.

    Views, and the size of a proprioception that `env.proprio_size` does not tell, show at the first observation.
    """
    where = f"environment {env.name!r}"
    if found := policy.space.differences(env.space):
        names = {group.name for group in policy.space.groups}
        posed = [g.name for g in env.space.groups if g.kind == "joint" and f"{g.name}_position" in names]
        if posed:
            raise SpaceMismatchError(
                f"the policy gives poses of the end effector, which a kinematic model made of the joints of"
                f" {', '.join(posed)}; {where} takes joints, and a rollout does not turn poses back. Train on the joints:"
                " leave out the [kinematics] table of the data's space"
            )
        raise SpaceMismatchError(
            f"the policy does not act in the action space of {where}: {'; '.join(found)}; roll it out where its training"
            " data came from"
        )
    rate = policy.space.rate_hz
    if rate is not None and not math.isclose(rate, env.rate_hz, rel_tol=1e-6):
        option = env.option_for("rate_hz", rate)
        raise SpaceMismatchError(
            f"the policy gives {rate:g} actions a second, {where} takes {env.rate_hz:g}; train it on data of that rate"
            + (f", or, where the data only state it wrongly, make the environment with {option}" if option else "")
        )
    if env.proprio_size is not None:
        _check_proprio(policy, env.proprio_size, where, _other_variant(env, policy.proprio))


def _other_variant(env: Env, size: int) -> str:
    """What gives a state of that size, in words: an option, NAME-state for NAME or the other way round; "" for nothing."""
    if (option := env.option_for("proprio_size", size)) is not None:
        return f"made with {option} it gives {size}: `--env-set {option}`"
    name = env.name.removesuffix("-state") if env.name.endswith("-state") else f"{env.name}-state"
    return f"{name!r} gives {size}" if name in list_envs() and env_class(name).proprio_size == size else ""


def _check_proprio(policy: Policy, size: int, where: str, other: str = "") -> None:
    if policy.proprio and policy.proprio != size:
        raise SpaceMismatchError(
            f"the policy reads a state of {policy.proprio} numbers, {where} gives {size}; roll it out where its"
            f" training data came from ({other or 'NAME and NAME-state differ'})"
        )


def check_observation(policy: Policy, cameras: Mapping[str, str], observation: Observation, env: Env) -> None:
    """Raise SpaceMismatchError where a first observation lacks what the policy looks at: see `check_environment`.

    That is its views and, unless the environment was made with an `image_size`, pictures of the size of its training.
    """
    where = f"environment {env.name!r}"
    _check_proprio(policy, len(observation.proprio), where)
    there = {name: image.shape[:2] for name, image in observation.images.items()}
    shows = ", ".join(f"{name} ({_pixels(size)})" for name, size in there.items()) or "no images"
    if missing := [view for view, camera in cameras.items() if camera not in there]:
        looks = ", ".join(view if view == camera else f"{view}={camera}" for view, camera in cameras.items())
        remedy = f"say which of these shows what: --cameras {' '.join(f'{view}=...' for view in missing)}"
        if not there:
            remedy = "make it with views, or take one that shows them in every observation"
        raise SpaceMismatchError(f"the policy looks through {looks}; {where} shows {shows}; {remedy}")
    if "image_size" in env.made_with:
        return
    trained = policy.meta.get("image_sizes") or {}
    for view, camera in cameras.items():
        if view in trained and tuple(trained[view]) != there[camera]:
            option = (
                "made with image_size (--images)" if "image_size" in option_names(type(env)) else "made to show that"
            )
            raise SpaceMismatchError(
                f"the policy was trained on pictures of {_pixels(trained[view])} of view {view}; {where} shows {shows};"
                f" it is to be {option}, or another of its views named (--cameras {view}=...)"
            )


def _pixels(size: Sequence[int]) -> str:
    """Height x width."""
    return " x ".join(map(str, size)) + " pixels"
