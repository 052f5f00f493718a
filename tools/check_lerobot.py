"""Does the real LeRobot read what actok writes? Run by check_lerobot.sh in an environment that has both.

Writes a small dataset in the layout that the installed LeRobot reads, opens it with LeRobotDataset, and compares every
value; hands the live LeRobotDataset to actok and compares again; then lets actok read what LeRobot writes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np

from actok.core import ActionSpace
from actok.data import Episode, open_dataset, write_lerobot

RATE = 20.0
RELEASE = tuple(int(part) for part in version("lerobot").split(".")[:2])


def stub_torchvision() -> None:
    """LeRobot imports torchvision and needs one class of it here; where it is not installed, that class stands in."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    import torch

    class ToTensor:
        def __call__(self, image: object) -> torch.Tensor:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    class Stub(types.ModuleType):
        __path__ = ()

        def __getattr__(self, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return ToTensor

    for name in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional", ".transforms.functional", ".io"):
        module = Stub(f"torchvision{name}")
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
        sys.modules[module.__name__] = module
        if name:
            parent, _, child = module.__name__.rpartition(".")
            setattr(sys.modules[parent], child, module)


def make_episodes() -> list[Episode]:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 64, dtype=np.uint8)
    names = ("reach", "grasp", "lift")
    return [
        Episode(
            index=i,
            actions=rng.standard_normal((length, 7)).astype(np.float32),
            proprio=rng.standard_normal((length, 11)).astype(np.float32),
            instruction=("pick up the cup", "close the drawer")[i % 2],
            task=("cup", "drawer")[i % 2],
            subtask=np.sort(rng.integers(0, 3, length)),
            subtask_names=names,
            success=bool(i % 2),
            start_state={"state": rng.standard_normal(5)},
            images={"front": np.broadcast_to(ramp[:, None, None], (length, 64, 96, 3)) + np.uint8(i)},
        )
        for i, length in enumerate((13, 17, 23))
    ]


def check(folder: Path, episodes: list[Episode], images: str, layout: str | None) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("actok/check", root=folder, video_backend="pyav")
    # Before 0.6 LeRobot decodes videos through torchvision, which may only be stood in for here.
    decoded = images == "image" or RELEASE >= (0, 6)
    assert dataset.num_episodes == len(episodes)
    assert dataset.num_frames == sum(map(len, episodes))
    assert dataset.fps == RATE
    everything = np.concatenate([e.actions for e in episodes])
    assert np.allclose(dataset.meta.stats["action"]["mean"], everything.mean(0), atol=1e-5)
    assert np.allclose(dataset.meta.stats["action"]["std"], everything.std(0), atol=1e-5)
    row = 0
    for episode in episodes:
        for t in range(len(episode)):
            item = dataset[row] if decoded else dataset.hf_dataset[row]
            assert np.array_equal(item["action"].numpy(), episode.actions[t]), (row, "action")
            assert np.array_equal(item["observation.state"].numpy(), episode.proprio[t]), (row, "state")
            assert abs(float(item["timestamp"]) - t / RATE) < 1e-6
            assert int(item["episode_index"]) == episode.index
            if layout == "column":
                index = int(item["subtask_index"])
                assert open_dataset(folder).meta.subtasks[index] == episode.subtask_names[episode.subtask[t]]
            if decoded:
                assert item["task"] == episode.instruction
                picture = item["observation.images.front"].numpy().transpose(1, 2, 0) * 255
                worst = np.abs(picture - episode.images["front"][t]).max()
                assert worst < (0.01 if images == "image" else 6), (row, worst)
            row += 1
    live = open_dataset(dataset)
    frames, _ = live.all_actions()
    assert np.array_equal(frames, everything)
    for episode, again in zip(episodes, live, strict=True):
        assert again.instruction == episode.instruction
        assert np.array_equal(again.start_state["state"], episode.start_state["state"])


def check_reading(folder: Path, episodes: list[Episode]) -> None:
    """The other way round: what LeRobot writes, actok reads."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        "action": {"dtype": "float32", "shape": (7,), "names": [f"a{i}" for i in range(7)]},
        "observation.state": {"dtype": "float32", "shape": (11,), "names": [f"s{i}" for i in range(11)]},
        "observation.images.front": {"dtype": "image", "shape": (64, 96, 3), "names": ["height", "width", "channels"]},
    }
    dataset = LeRobotDataset.create("actok/check", fps=int(RATE), features=features, root=folder, use_videos=False)
    for episode in episodes:
        for t in range(len(episode)):
            frame = {
                "action": episode.actions[t],
                "observation.state": episode.proprio[t],
                "observation.images.front": episode.images["front"][t],
            }
            if RELEASE < (0, 4):
                dataset.add_frame(frame, task=episode.instruction)
            else:
                dataset.add_frame(frame | {"task": episode.instruction})
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()
    for episode, read in zip(episodes, open_dataset(folder), strict=True):
        assert np.array_equal(read.actions, episode.actions)
        assert np.array_equal(read.proprio, episode.proprio)
        assert read.instruction == episode.instruction
        images = open_dataset(folder).episode(episode.index, images=True).images
        assert np.array_equal(images["observation.images.front"], episode.images["front"])


def main() -> None:
    # First, since transformers would take the stand-in for the real one.
    importlib.import_module("transformers")
    importlib.import_module("transformers.models.auto")
    stub_torchvision()
    format_version = "v2.1" if RELEASE < (0, 4) else "v3.0"
    layouts = (None, "language_persistent") if RELEASE >= (0, 6) else (None, "column")
    episodes = make_episodes()
    with tempfile.TemporaryDirectory() as scratch:
        for images in ("image", "video"):
            for layout in layouts:
                folder = Path(scratch) / f"{images}-{layout}"
                write_lerobot(
                    episodes,
                    folder,
                    space=ActionSpace.raw(7, "check"),
                    rate_hz=RATE,
                    version=format_version,
                    subtask_layout=layout,
                    images=images,
                )
                check(folder, episodes, images, layout)
                print(f"lerobot {version('lerobot')}, {format_version}, {images}, sub-tasks {layout}: equal")
        check_reading(Path(scratch) / "theirs", episodes)
        print(f"lerobot {version('lerobot')}: what it writes is read equal")


if __name__ == "__main__":
    main()
