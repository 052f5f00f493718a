"""Small demonstrations with states, images and sub-tasks, and a policy of two layers, for tests of training."""

import numpy as np
import torch
from torch import nn

from actok.core import (
    ActionGroup,
    ActionSpace,
)
from actok.policies.base import Policy
from actok.training.policy_data import PolicyData

D, P, T, H, W = 3, 5, 7, 4, 6
TINY = {"backbone": {"width": 16, "layers": 1, "heads": 2}, "spacing": 0}
FEW = {"steps": 6, "batch_size": 8, "log_every": 2, "eval_every": 3, "eval_chunks": 17, "checkpoint_every": 0}


def frames(episodes: int = 20, seed: int = 0, **more) -> dict:
    """Arrays of a dataset: two tasks, states, images, numbered phases."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(11, 24, episodes)
    count = int(lengths.sum())
    return {
        "action": rng.normal(size=(count, D)).astype("float32"),
        "proprio": rng.normal(size=(count, P)).astype("float32"),
        "image": rng.integers(0, 256, (count, H, W, 3)).astype("uint8"),
        "episode_length": lengths,
        "episode_task": np.array(["open", "shut"])[np.arange(episodes) % 2],
        "instruction": np.array(["open the box", "shut the box"])[np.arange(episodes) % 2],
        "phase": rng.integers(0, 2, count),
        "phase_names": np.array(["reach", "pull"]),
        **more,
    }


def space_of(name: str, rate_hz: float) -> ActionSpace:
    group = ActionGroup(name="all", kind="joint", dims=tuple(range(D)), mode="absolute", unit="rad", scale=1.0)
    return ActionSpace(embodiment=name, dim=D, groups=(group,), rate_hz=rate_hz)


def without(*keys: str) -> dict:
    return {key: value for key, value in frames().items() if key not in keys}


class Regressor(Policy):
    """States to chunks by two linear maps, a head that is not asked, and dropout."""

    def __init__(self, data: PolicyData, breaks: bool = False) -> None:
        super().__init__()
        self.tokenizer, self.embodiment, self.horizon = data.tokenizer, data.embodiment, data.horizon
        self.views, self.proprio, self.meta, self.breaks = (), data.proprio, {}, breaks
        self.backbone = nn.Sequential(nn.Linear(P, 13), nn.Tanh(), nn.Dropout(0.1))
        self.parts = nn.ModuleDict({"flow": nn.Linear(13, T * D)})
        self.noted = 0.0

    heads = ("flow",)

    def losses(self, batch):
        hidden = self.backbone(torch.from_numpy(batch.observation.proprio))
        error = (self.parts["flow"](hidden).unflatten(1, (T, D)) - batch.actions)[batch.real]
        self.noted = float(error.detach().abs().max())
        return {"l1": error.abs().mean() * (float("nan") if self.breaks else 1.0), "noise": 0.01 * torch.rand(())}

    def report(self):
        return {"worst": self.noted}

    def act(self, observation, *, head=None, generator=None, deadline_s=None):
        raise NotImplementedError

    def save_pretrained(self, folder):
        raise NotImplementedError


def regressor(data: PolicyData, seed: int = 3, **options) -> Regressor:
    torch.manual_seed(seed)
    return Regressor(data, **options)


def weights(policy: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
