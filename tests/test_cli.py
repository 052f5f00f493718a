"""The verbs, end to end on a generated dataset, in one process: outputs, exit codes, one-line errors."""

import json
import re

import numpy as np
import pytest

import actok
from actok.cli import main
from actok.core import MissingExtraError
from actok.data import Episode, open_dataset
from actok.data.lerobot_read import LeRobotFolder
from actok.data.lerobot_write import write_lerobot

SPACE = """
embodiment = "test_arm"
dim = 3
rate_hz = 20.0
[[groups]]
name = "position"
kind = "position"
dims = [0, 1]
unit = "m"
scale = 1.0
[[groups]]
name = "gripper"
kind = "gripper"
dims = [2]
unit = "fraction"
scale = 1.0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dataset of 30 episodes, its action space, and a fitted FAST."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    lengths = rng.integers(31, 53, 30)
    actions = np.concatenate(
        [
            np.sin(np.linspace(0, 3, n)[:, None] * rng.uniform(0.5, 2, (1, 3)) + rng.uniform(0, 6, (1, 3)))
            for n in lengths
        ]
    )
    actions[:, 2] = actions[:, 2] > 0
    np.savez(folder / "demos.npz", action=actions.astype(np.float32), episode_length=lengths, control_hz=20.0)
    (folder / "space.toml").write_text(SPACE)
    assert main(["fit", "fast", *data(folder), "--out", str(folder / "tok"), "--set", "scale=20"]) == 0
    return folder


def data(folder) -> list[str]:
    return ["--data", str(folder / "demos.npz"), "--space", str(folder / "space.toml")]


def fails(arguments, capsys) -> str:
    """Run, expect exit code 1 and a single line on stderr; return it."""
    capsys.readouterr()
    assert main(arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("actok: error: ")
    return lines[0]


def test_fit_takes_settings_and_says_what_it_made(place):
    tokenizer = actok.load(place / "tok")
    assert tokenizer.config.scale == 20
    assert tokenizer.horizon == 20
    assert list(tokenizer.spaces) == ["test_arm"]


def test_encode_then_decode_gives_the_data_back(place, capsys):
    tokens, out = place / "tokens.parquet", place / "actions.npz"
    assert main(["encode", str(place / "tok"), *data(place), "--out", str(tokens)]) == 0
    assert main(["decode", str(place / "tok"), "--tokens", str(tokens), "--out", str(out)]) == 0
    assert "0 did not decode" in capsys.readouterr().out
    decoded, demos = np.load(out), np.load(place / "demos.npz")
    starts = np.concatenate([[0], np.cumsum(demos["episode_length"])])
    assert decoded["valid"].all()
    covered = 0
    for chunk, episode, start, real in zip(
        decoded["actions"], decoded["episode"], decoded["start"], decoded["real_steps"], strict=True
    ):
        first = starts[episode] + start
        error = np.abs(chunk[:real] - demos["action"][first : first + real])
        assert error.max() < 0.3
        covered += real
    assert covered == demos["episode_length"].sum()


def test_decode_counts_what_does_not_decode_and_repairs_only_when_asked(place, capsys):
    from dataclasses import replace

    from actok.data import read_tokens, write_tokens

    source, broken = place / "to_break.parquet", place / "broken.parquet"
    assert main(["encode", str(place / "tok"), *data(place), "--out", str(source)]) == 0
    table = read_tokens(source)
    cut = replace(table, ids=table.ids[1:], offsets=np.maximum(table.offsets - 1, 0))
    write_tokens(cut, broken)
    arguments = ["decode", str(place / "tok"), "--tokens", str(broken), "--out", str(place / "broken.npz")]
    assert main(arguments) == 3
    assert "1 sequences are invalid" in capsys.readouterr().err
    out = np.load(place / "broken.npz")
    assert out["valid"].sum() == len(out["valid"]) - 1
    assert np.isnan(out["actions"][0]).all()
    assert main([*arguments, "--repair", "truncate_pad"]) == 3
    repaired = np.load(place / "broken.npz")
    assert repaired["repaired"].tolist() == (~out["valid"]).tolist()
    assert np.isfinite(repaired["actions"]).all()


def test_decode_with_another_tokenizer_is_refused(place, capsys):
    tokens = place / "other.parquet"
    assert main(["encode", str(place / "tok"), *data(place), "--out", str(tokens)]) == 0
    assert main(["fit", "bins", *data(place), "--out", str(place / "bins")]) == 0
    message = fails(["decode", str(place / "bins"), "--tokens", str(tokens), "--out", str(place / "x.npz")], capsys)
    assert "decode with the one that encoded" in message
    assert not (place / "x.npz").exists()


def test_encoding_data_of_another_space_is_refused(place, capsys):
    np.savez(place / "wide.npz", action=np.zeros((50, 5), np.float32), episode_length=[50])
    message = fails(
        ["encode", str(place / "tok"), "--data", str(place / "wide.npz"), "--out", str(place / "y.parquet")], capsys
    )
    assert "dimensions: 3 against 5" in message


def test_rates_are_resampled_when_asked_and_mentioned_when_they_differ(place, capsys):
    """Data at twice the rate: a warning names the remedy, and with it there are half as many steps."""
    demos = np.load(place / "demos.npz")
    np.savez(place / "fast.npz", action=demos["action"], episode_length=demos["episode_length"], control_hz=40.0)
    arguments = ["encode", str(place / "tok"), "--data", str(place / "fast.npz"), "--space", str(place / "space.toml")]
    out = place / "rate.parquet"
    assert main([*arguments, "--out", str(out)]) == 0
    assert "resample with --rate 20" in capsys.readouterr().err
    from actok.data import read_tokens

    steps = read_tokens(out).real_steps.sum()
    assert main([*arguments, "--out", str(out), "--rate", "20"]) == 0
    assert capsys.readouterr().err == ""
    halves = -(-demos["episode_length"] // 2)
    assert (steps, read_tokens(out).real_steps.sum()) == (demos["episode_length"].sum(), halves.sum())
    fast = str(place / "fit40")
    assert main(["fit", "bins", *arguments[2:], "--out", fast, "--rate", "10"]) == 0
    assert actok.load(fast).spaces["test_arm"].rate_hz == 10


def test_tolerance_reports_what_it_chose(place, capsys):
    out = str(place / "tol")
    assert main(["fit", "bins", *data(place), "--out", out, "--tolerance", "20 mm"]) == 0
    assert "is the coarsest of" in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    assert "on test episodes" in capsys.readouterr().out


def test_inspect_shows_a_tokenizer_and_a_dataset(place, capsys):
    assert main(["inspect", str(place / "tok"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "fast"
    assert facts["hash"] == actok.load(place / "tok").weights_hash
    assert main(["inspect", str(place / "demos.npz"), "--space", str(place / "space.toml")]) == 0
    text = capsys.readouterr().out
    assert "30, 31 to" in text
    assert "test_arm" in text
    assert main(["inspect", str(place / "demos.npz"), "--json"]) == 0
    assert (facts := json.loads(capsys.readouterr().out))["episodes"] == 30
    assert (facts["views"], facts["state"]) == ({}, None)


def test_inspect_names_views_and_state_of_a_dataset(tmp_path, capsys):
    frames = {"action": np.zeros((11, 3), np.float32), "proprio": np.zeros((11, 5), np.float32)}
    images = np.zeros((11, 4, 6, 3), np.uint8)
    np.savez(tmp_path / "seen.npz", **frames, image=images, episode_length=[11])
    assert main(["inspect", str(tmp_path / "seen.npz")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^view image +6 x 4 pixels$", text, re.M)
    assert re.search(r"^state +5 numbers$", text, re.M)
    assert main(["inspect", str(tmp_path / "seen.npz"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["views"], facts["state"]) == ({"image": [4, 6]}, 5)


def test_inspect_tells_the_views_of_a_lerobot_folder_without_reading_them(tmp_path, capsys, monkeypatch):
    space = open_dataset([np.zeros((11, 3), np.float32)]).space
    images = {"corner2": np.zeros((11, 16, 24, 3), np.uint8)}
    actions = np.zeros((11, 3), np.float32)
    episode = Episode(index=0, actions=actions, task="go", images=images)
    write_lerobot([episode], tmp_path / "folder", space=space, rate_hz=10.0, images="image")
    monkeypatch.setattr(LeRobotFolder, "_images", None)
    assert main(["inspect", str(tmp_path / "folder")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^view observation\.images\.corner2 +24 x 16 pixels; train-policy takes corner2 too$", text, re.M)
    info = tmp_path / "folder" / "meta" / "info.json"
    body = json.loads(info.read_text())
    feature = body["features"]["observation.images.corner2"]
    for shape, words in (([3, 16, 24], "24 x 16 pixels"), ([16, 24], "states shape [16, 24]")):
        feature["shape"] = shape
        info.write_text(json.dumps(body))
        main(["inspect", str(tmp_path / "folder")])
        assert words in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("tokenizers", "fast"),
        ("spaces", "bridge_widowx"),
        ("mixtures", "faster_s"),
        ("policies", "actok-vla-tiny"),
        ("envs", "metaworld-state"),
    ],
)
def test_list_names_everything_of_a_kind(what, name, capsys):
    assert main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [line.split()[0] for line in lines] == [row["name"] for row in rows]
    assert name in [row["name"] for row in rows]
    assert all(row["summary"] for row in rows)


def test_environments_say_what_they_are_or_what_is_missing(monkeypatch, capsys):
    import actok.envs

    there = actok.envs.make_env

    def make(name):
        if name == "aloha":
            raise MissingExtraError("gym_aloha", "aloha", "the environment 'aloha'")
        return there(name)

    monkeypatch.setattr(actok.envs, "make_env", make)
    assert main(["list", "envs", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert "pip install 'actok[aloha]'" in rows["aloha"]["summary"]
    assert rows["aloha"]["tasks"] is None
    assert len(rows["metaworld"]["tasks"]) == 50
    assert "actions of 4 at 80 Hz; a state of 21" in rows["metaworld-state"]["summary"]


def test_bench_writes_results_table_and_report(place, capsys):
    out = place / "bench"
    arguments = ["bench", *data(place), "--tokenizers", f"bins,bins:bins=8,{place / 'tok'}", "--out", str(out)]
    assert main(arguments) == 0
    assert "bins" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert {r["tokenizer"]: r["settings"].get("bins") for r in results["results"]} == {
        "bins": 256,
        "bins:bins=8": 8,
        "tok": None,
    }
    assert "<html" in (out / "report.html").read_text()


def test_errors_name_the_value_and_the_remedy(place, capsys):
    cases = [
        (["fit", "fsat", *data(place), "--out", str(place / "z")], "did you mean 'fast'?"),
        (["fit", "fast", *data(place), "--out", str(place / "z"), "--set", "scal=3"], "did you mean 'scale'?"),
        (["fit", "fast", *data(place), "--out", str(place / "z"), "--set", "scale"], "key=value"),
        (["fit", "fast", "--data", str(place / "none"), "--out", str(place / "z")], "none"),
        (["fit", "fast", "--data", str(place / "demos.npz"), "--space", "widow", "--out", str(place / "z")], "widow"),
        (["fit", "fast", *data(place), "--out", str(place / "z"), "--horizon", "0"], "horizon is 0"),
        (["fit", "fast", *data(place), "--out", str(place / "z"), "--set", "horizon=5"], "give --horizon"),
        (["fit", "fast", *data(place), "--out", str(place / "z"), "--set", "scale=abc"], "scale='abc'"),
        (["fit", "beast", *data(place), "--out", str(place / "z"), "--set", "clamp_start=False"], "true or false"),
        (["fit", "fast", *data(place), "--out", "/proc/z"], "/proc/"),
        (["encode", str(place / "tok"), *data(place), "--out", str(place)], "name a file"),
        (["encode", str(place / "none"), *data(place), "--out", str(place / "t")], "does not exist"),
        (
            ["decode", str(place / "tok"), "--tokens", str(place / "demos.npz"), "--out", str(place / "t")],
            "cannot be read",
        ),
        (["bench", *data(place), "--tokenizers", "fsat", "--out", str(place / "b")], "did you mean 'fast'?"),
        (["bench", *data(place), "--tokenizers", "bins", "--horizon", "0", "--out", str(place / "b")], "horizon is 0"),
        (
            ["replay", "--data", str(place / "demos.npz"), "--tokenizers", ",", "--out", str(place / "r")],
            "no tokenizer",
        ),
        (["replay", "--tokenizers", "fsat", "--out", str(place / "r")], "did you mean 'fast'?"),
        (["collect", "--env", "metaverse", "--out", str(place / "c")], "metaverse"),
    ]
    for arguments, words in cases:
        assert words in fails(arguments, capsys), arguments
    assert not (place / "z").exists()


def test_a_folder_that_the_outcome_cannot_go_into_is_refused_before_data_are_read(place, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("remember the milk")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text('{"schema_version": 1, "policy": "vla", "tokenizer": "0"}')
    nowhere = ["--data", str(tmp_path / "nowhere")]
    fit, learn = ["fit", "fast", *nowhere], ["fit", "vqbet-tiny", *nowhere]
    train = ["train-policy", "--tokenizer", "fast", *nowhere]
    new = str(tmp_path / "new")
    for arguments, words in (
        ([*fit, "--out", str(tmp_path / "notes")], "notes holds 'todo.txt' and no tokenizer"),
        ([*fit, "--out", str(tmp_path / "policy")], "holds a policy, which would be lost"),
        ([*fit, "--out", str(place / "demos.npz")], "is a file"),
        ([*learn, "--out", new, "--run", str(tmp_path / "notes")], "something else than a training run"),
        ([*train, "--out", str(tmp_path / "notes")], "notes holds 'todo.txt' and no policy"),
        ([*train, "--out", str(place / "tok")], "holds a tokenizer, which would be lost"),
        ([*train, "--out", new, "--run", str(tmp_path / "notes")], "something else than a training run"),
        ([*train, "--out", new, "--run", f"{new}/run"], "is in --out"),
        ([*train, "--out", str(tmp_path / "policy")], "nowhere"),  # a policy may be replaced by one
        ([*fit, "--out", str(place / "tok")], "nowhere"),
    ):
        assert words in fails(arguments, capsys), arguments
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "policy"}


def test_published_files_without_an_action_space(place, capsys):
    actok.load(place / "tok").to_published(place / "published")
    processor = place / "published" / "processor_config.json"
    values = {**json.loads(processor.read_text()), "time_horizon": None, "action_dim": None}
    processor.write_text(json.dumps(values))
    assert main(["inspect", str(place / "published")]) == 0
    assert "any; to be named in every call" in capsys.readouterr().out
    assert main(["inspect", str(place / "published"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] is None
    arguments = ["encode", str(place / "published"), *data(place), "--out", str(place / "t.parquet")]
    assert "no action space of its own" in fails(arguments, capsys)


def test_ctrl_c_inside_compiled_code_is_an_interruption(place, capsys, monkeypatch):
    """Numba turns a KeyboardInterrupt into a SystemError."""
    from actok import training

    def fit(*_, **__):
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    monkeypatch.setattr(training, "fit", fit)
    assert main(["fit", "fast", *data(place), "--out", str(place / "z")]) == 130
    assert capsys.readouterr().err == "actok: interrupted; no file was left half-written\n"


def test_debug_shows_the_traceback(place):
    with pytest.raises(actok.ActokError):
        main(["inspect", str(place / "none"), "--debug"])
