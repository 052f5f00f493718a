"""Options of environments: what one was made with, what the command line can say, where it is written, what films keep."""

import json
import pickle

import numpy as np
import pytest

import actok.envs.base as base
from actok.cli import main
from actok.core import ConfigError, FitPart
from actok.envs import make_env, option_names
from actok.evaluation import filming
from actok.evaluation.trials import Trial
from actok.evaluation.vector import Start
from actok.evaluation.workers import Workers
from actok.policies.tiny import TinyConfig, TinyVLM
from actok.policies.vla import VLA, VLAConfig
from actok.tokenizers.bins import BinsConfig, BinsTokenizer
from pointmass import PointMass
from test_rollout import Scripted

gymnasium = pytest.importorskip("gymnasium")
from test_env_gymnasium import Bead, Slide  # noqa: E402


class Geared(PointMass):
    """The point mass with options of every sort: D = 3, P = 5."""

    name = "geared"
    default_views = ("top",)

    def __init__(
        self, gear: float = 1.0, *, words: str = "go", views: tuple[str, ...] = (), image_size: int = 7
    ) -> None:
        super().__init__(view=bool(views))
        self.gear, self.words, self.views, self.image_size = gear, words, views, image_size

    def instruction(self, task: str) -> str:
        return f"{self.words} {super().instruction(task)}"


class Camera(Bead):
    """A user's own class that no entry point names: it makes pictures of the size that it is told, of what its gain is."""

    name = "camera"
    default_views = ("side",)

    def __init__(self, gain: float, views: tuple[str, ...] = (), image_size: int = 5) -> None:
        super().__init__(gain)
        self.views, self.size = views, image_size

    def make(self, task):
        return Slide()

    def images(self, observation):
        return {view: np.full((self.size, self.size, 3), int(self.gain), np.uint8) for view in self.views}


class AlwaysOn(Bead):
    """One that shows its pictures of 3 x 5 whoever asks, and has no option for it."""

    name = "always-on"
    default_views = ("side",)


class Blind(Bead):
    """One without a picture."""

    name = "blind"

    def images(self, observation):
        return {}


def looking(folder, views: dict[str, list[int]]) -> str:
    """A saved policy of the bead that looks through these views, untrained; sizes are those that it says it was trained on."""
    space = Bead.space
    chunks = np.random.default_rng(0).normal(size=(29, 7, space.dim)).astype(np.float32)
    backbone = TinyVLM.create(
        TinyConfig(width=32, layers=1, heads=2, image_size=32), ["slide to the place"], tuple(views)
    )
    tokenizer = BinsTokenizer.fit([FitPart(actions=chunks, space=space)], BinsConfig(bins=17))
    meta = {"task_steps": {"slide": 9.0}, "image_sizes": views}
    VLA.create(backbone, tokenizer, VLAConfig(state="none"), views=tuple(views), meta=meta).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"geared": "Geared", "camera": "Camera", "always-on": "AlwaysOn", "blind": "Blind"}
    mine = {name: f"test_env_options:{found}" for name, found in own.items()}
    monkeypatch.setattr(base, "BUILT_IN", {**base.BUILT_IN, **mine})


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Films are made here, by an environment that has travelled."""
    monkeypatch.setattr(filming, "Workers", lambda env, count: Workers(pickle.loads(pickle.dumps(env)), 1))


# -- what an environment was made with --------------------------------------------------------------------------------


def test_an_environment_knows_its_options_however_it_was_made(named) -> None:
    assert option_names(Geared) == ["gear", "words", "views", "image_size"]
    assert make_env("geared", gear=3.0).made_with == {"gear": 3.0}
    assert Geared(3.0, words="run").made_with == {"gear": 3.0, "words": "run"}
    assert Geared().made_with == {}
    for made in (Geared(2.0), Camera(2.0)):
        assert pickle.loads(pickle.dumps(made)).made_with == made.made_with
    with pytest.raises(ConfigError, match=r"'geared' has no option 'gearr'; it takes gear, words, views, image_size$"):
        make_env("geared", gearr=1)
    with pytest.raises(TypeError, match="gearr"):
        Geared(gearr=1)


def test_an_environment_without_a_constructor_takes_nothing() -> None:
    class Bare(PointMass):
        name = "bare"
        __init__ = object.__init__

    assert option_names(Bare) == []
    assert Bare().made_with == {}


def test_other_views_leave_all_else_as_it_was() -> None:
    env = Geared(2.0, words="run", views=("top",))
    seen = env.with_views(("top",), 13)
    assert type(seen) is Geared
    assert (seen.gear, seen.words, seen.views, seen.image_size) == (2.0, "run", ("top",), 13)
    assert env.image_size == 7
    assert env.with_views(("top",)).image_size == 7
    assert AlwaysOn(3.0).with_views(("side",), 13).made_with == {"gain": 3.0}


def test_what_json_does_not_know_is_told_as_text(tmp_path) -> None:
    made = Geared(words=tmp_path, views=("top",))
    assert made.options_as_json() == {"words": str(tmp_path), "views": ["top"]}


# -- films ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "side"), [(Camera(200.0), (34, 34)), (AlwaysOn(200.0), (3, 5))], ids=["camera", "always-on"]
)
def test_an_environment_that_nobody_registered_is_filmed(env, side, tmp_path, alone) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (11, 2)).astype(np.float32)
    trial = Trial(start=Start(task="slide", seed=3), number=2, limit=11, instruction="go", steps=11, executed=[actions])
    env.reset("slide", seed=3)
    for action in actions:
        env.step(action)
        trial.success = trial.success or env.success
    (filmed,) = filming.film_some(env, [trial], 1, tmp_path, size=34)
    assert (filmed["view"], filmed["reproduced"]) == ("side", True)
    from PIL import Image

    with Image.open(tmp_path / filmed["sheet"]) as sheet:
        assert (sheet.height, sheet.width) == (2 * (side[0] + 16) + 32, 4 * side[1])
        if isinstance(env, Camera):
            assert sheet.getpixel((1, 1)) == (200, 200, 200), "its gain went along"
    if filmed["video"] is not None:
        av = pytest.importorskip("av")
        with av.open(str(tmp_path / filmed["video"])) as container:
            stream = container.streams.video[0]
            assert (stream.height, stream.width) == tuple(size + size % 2 for size in side)


# -- the command line -------------------------------------------------------------------------------------------------


def test_collected_data_and_replays_say_what_the_simulator_was_made_with(named, tmp_path, capsys) -> None:
    demos = tmp_path / "demos"
    arguments = ["--env", "geared", "--workers", "1", "--env-set", "gear=2.5"]
    assert (
        main(["collect", *arguments, "words=hurry up", "--tasks", "near", "--episodes", "20", "--out", str(demos)]) == 0
    )
    told = json.loads((demos / "meta" / "actok" / "collection.json").read_text())
    assert (told["env"], told["options"]) == ("geared", {"gear": 2.5, "words": "hurry up"})
    assert told["tasks"]["near"]["kept"] == told["kept"] == 20
    assert "hurry up go to the near goal" in (demos / "meta" / "tasks.parquet").read_bytes().decode("latin-1")
    out = tmp_path / "replay"
    assert main(["replay", *arguments, "--data", str(demos), "--tokenizers", "bins", "--out", str(out)]) == 0
    assert json.loads((out / "replay.json").read_text())["env_options"] == {"gear": 2.5}
    closed = ["--closed-loop", "--data", str(demos), "--tokenizers", "bins", "--out", str(out), "--horizon", "3"]
    assert main(["replay", *arguments, *closed]) == 0
    assert json.loads((out / "closed_loop.json").read_text())["env_options"] == {"gear": 2.5}


def test_a_rollout_says_what_the_simulator_was_made_with(named, tmp_path, monkeypatch, capsys) -> None:
    seen: list[dict] = []

    class Looking(Scripted):
        def act(self, observation, **rest):
            seen.append({view: image.shape for view, image in observation.images.items()})
            return super().act(observation, **rest)

    policy = Looking(views=("observation.images.image", "wrist_image"))
    policy.meta = {"image_sizes": {"observation.images.image": [19, 19]}, "task_steps": {"near": 11.0}}
    monkeypatch.setattr("actok.policies.load.load_policy", lambda source: policy)
    arguments = ["rollout", "--policy", "p", "--env", "geared", "--workers", "1", "--episodes", "2", "--record", "0"]
    cameras = ["--cameras", "image=top", "wrist_image=top"]
    assert main([*arguments, "--out", str(tmp_path), "--env-set", "gear=2.5", *cameras]) == 0
    result = json.loads((tmp_path / "rollout.json").read_text())
    assert result["env"]["options"] == {"gear": 2.5, "views": ["top"], "image_size": 19}
    assert result["cameras"] == {"observation.images.image": "top", "wrist_image": "top"}
    assert result["success"] == [True, True]
    assert seen[0] == {"observation.images.image": (2, 2, 3, 3), "wrist_image": (2, 2, 3, 3)}


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (["collect"], "recorded with --images PIXELS"),
        (["replay", "--tokenizers", "bins"], "makes no pictures"),
        (["rollout", "--policy", "p"], "give their size with --images, other names with --cameras"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_options_that_have_a_way_of_their_own_are_refused(named, verb, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("actok.policies.load.load_policy", lambda source: Scripted())
    line = [*verb, "--env", "geared", "--out", str(tmp_path / "out"), "--env-set"]
    for option in ("views=top", "image_size=9"):
        assert main([*line, option]) == 1
        said = capsys.readouterr().err
        assert f"--env-set {option.split('=')[0]} is not possible" in said
        assert words in said
    assert main([*line, "gearr=1"]) == 1
    assert "has no option 'gearr'; it takes gear, words, views, image_size" in capsys.readouterr().err
    assert main([*line, "gear"]) == 1
    assert "has no '='" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cameras_that_do_not_fit_are_named_with_those_that_there_are(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("metaworld")
    from actok.benchmark.rollouts import environment_for

    policy = Scripted(views=("observation.images.image", "corner2", "wrist_image"))
    policy.meta = {"image_sizes": {"corner2": [48, 48]}}
    with pytest.raises(
        ConfigError,
        match=r"looks through observation.images.image, corner2, wrist_image; environment 'metaworld' has no view image,"
        r" wrist_image, only corner, corner2, .*--cameras observation.images.image=... wrist_image=...$",
    ):
        environment_for(policy, "metaworld")
    env = environment_for(policy, "metaworld", cameras={"image": "topview", "wrist_image": "gripperPOV"})
    assert env.made_with == {"views": ("topview", "corner2", "gripperPOV"), "image_size": 48}
    with pytest.raises(
        ConfigError, match="name 'left', which the policy does not look through; its views: image, corner2"
    ):
        environment_for(policy, "metaworld", cameras={"left": "topview"})
    with pytest.raises(ConfigError, match="name the view 'image' twice"):
        environment_for(policy, "metaworld", cameras={"image": "topview", "observation.images.image": "corner"})
    monkeypatch.setattr("actok.policies.load.load_policy", lambda source: policy)
    line = ["rollout", "--policy", "p", "--env", "metaworld", "--out", str(tmp_path / "out"), "--cameras"]
    for pairs, words in ((["image"], "'image' is not VIEW=CAMERA"), (["image=corner", "image=topview"], "twice")):
        assert main([*line, *pairs]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env", "options"), [("camera", {"gain": 200, "views": ["side"], "image_size": 13}), ("always-on", {"gain": 200})]
)
def test_a_policy_looks_at_what_a_users_own_environment_shows(
    named, env, options, tmp_path, monkeypatch, capsys
) -> None:
    seen: list[tuple[int, ...]] = []
    act = VLA.act

    def watched(self, observation, **rest):
        seen.extend(image.shape[1:] for image in observation.images.values())
        return act(self, observation, **rest)

    monkeypatch.setattr(VLA, "act", watched)
    size = [13, 13] if env == "camera" else [3, 5]
    line = ["rollout", "--env", env, "--episodes", "2", "--workers", "1", "--record", "0", "--env-set", "gain=200"]
    policy = looking(tmp_path / "p", {"observation.images.side": size})
    assert main([*line, "--policy", policy, "--out", str(tmp_path / "r")]) == 0
    result = json.loads((tmp_path / "r" / "rollout.json").read_text())
    assert result["env"]["options"] == options
    assert set(seen) == {(*size, 3)}
    other = looking(tmp_path / "q", {"front": size})
    assert main([*line, "--policy", other, "--out", str(tmp_path / "s"), "--cameras", "front=side"]) == 0
    assert json.loads((tmp_path / "s" / "rollout.json").read_text())["cameras"] == {"front": "side"}


@pytest.mark.parametrize(
    ("more", "view", "size", "words"),
    [
        (
            "always-on",
            "side",
            [5, 3],
            "trained on pictures of 5 x 3 pixels of view side; environment 'always-on' shows side",
        ),
        ("always-on", "side", [5, 3], "(3 x 5 pixels); it is to be made to show that, or another of its views named"),
        ("always-on", "top", [3, 5], "looks through top; environment 'always-on' shows side (3 x 5 pixels); say which"),
        ("always-on", "top", [3, 5], "--cameras top=..."),
        ("always-on --cameras top=front", "top", [3, 5], "looks through top=front; environment 'always-on' shows side"),
        ("always-on --images 7", "side", [3, 5], "environment 'always-on' has no option image_size: its pictures"),
        (
            "blind",
            "side",
            [3, 5],
            "looks through side; environment 'blind' shows no images; make it with views, or take",
        ),
        ("camera --env-set gain=1", "side", [3, 5], "training images have sides of 3, 5 pixels"),
    ],
)
def test_pictures_that_are_not_those_of_the_training_are_refused(
    named, more, view, size, words, tmp_path, capsys
) -> None:
    policy = looking(tmp_path / "p", {view: size})
    line = ["rollout", "--policy", policy, "--out", str(tmp_path / "r"), "--workers", "1", "--record", "0"]
    assert main([*line, "--env", *more.split()]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_an_environment_that_always_shows_its_pictures_is_recorded_without_asking_for_them(
    named, tmp_path, capsys
) -> None:
    line = ["collect", "--env", "always-on", "--tasks", "slide", "--out", str(tmp_path / "demos"), "--images", "32"]
    assert main(line) == 1
    assert "its pictures are recorded as they are; collect without --images" in capsys.readouterr().err


# -- what they cost ---------------------------------------------------------------------------------------------------


def test_the_benchmark_of_speed_measures_and_names_what_it_cannot(tmp_path) -> None:
    pytest.importorskip("gym_aloha")
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).resolve().parents[1] / "benchmarks" / "env_speed.py"
    out = tmp_path / "speed.json"
    command = [
        sys.executable,
        str(script),
        "--envs",
        "aloha",
        "alohha",
        "--steps",
        "3",
        "--pixels",
        "16",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(out.read_text())
    assert "did you mean 'aloha'" in result["missing"]["alohha"]
    assert "alohha: not measured" in done.stdout
    if "aloha" in result["missing"]:  # no OpenGL here
        assert "OpenGL" in result["missing"]["aloha"]
        return
    (row,) = result["rows"]
    assert 0 < row["step_ms"]["p50"] <= row["step_ms"]["p95"]
    assert row["picture_ms"]["16"] > 0
    assert f"| `aloha`, {row['task']} |" in done.stdout
