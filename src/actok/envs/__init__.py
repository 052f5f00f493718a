"""Simulators behind one small interface, each an optional extra."""

from actok.envs.base import Env, Expert, ExpertAction, Observation, env_class, list_envs, make_env, option_names

__all__ = ["Env", "Expert", "ExpertAction", "Observation", "env_class", "list_envs", "make_env", "option_names"]
