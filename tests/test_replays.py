"""`actok collect` and `actok replay`, end to end in Meta-World."""

import json

import pytest

from actok.cli import main

pytest.importorskip("metaworld")


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos") / "reach"
    arguments = ["--tasks", "reach-v3,push-v3", "--episodes", "10", "--workers", "1"]
    assert main(["collect", "--out", str(folder), *arguments]) == 0
    return folder


def test_presets_and_saved_tokenizers_replay_held_out_episodes(demonstrations, tmp_path, capsys):
    """One test episode of each task in ten; the exact demonstrations succeed; a published folder takes part."""
    fast = tmp_path / "published"
    assert main(["fit", "fast", "--data", str(demonstrations), "--out", str(tmp_path / "own")]) == 0
    import actok

    actok.load(tmp_path / "own").to_published(fast)
    names = f"bins,{tmp_path / 'own'},{fast}"
    assert (
        main(
            [
                "replay",
                "--tokenizers",
                names,
                "--data",
                str(demonstrations),
                "--out",
                str(tmp_path / "r"),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    result = json.loads((tmp_path / "r" / "replay.json").read_text())
    assert sorted(e["task"] for e in result["episodes"]) == ["push-v3", "reach-v3"]
    assert list(result["tokenizers"]) == ["exact", "bins", "own", "published"]
    assert result["tokenizers"]["exact"]["rate"] == 1.0
    assert [t["invalid"] for t in result["tokenizers"].values()] == [0, 0, 0, 0]
    assert result["tokenizers"]["own"]["success"] == result["tokenizers"]["published"]["success"]
    assert "bins against exact" in capsys.readouterr().out
    assert result["provenance"]["seed"] == 0


def test_a_tokenizer_of_another_split_is_mentioned(demonstrations, tmp_path, capsys):
    arguments = ["--data", str(demonstrations), "--seed", "1"]
    assert main(["fit", "bins", *arguments, "--out", str(tmp_path / "other")]) == 0
    assert (
        main(
            [
                "replay",
                "--tokenizers",
                str(tmp_path / "other"),
                "--data",
                str(demonstrations),
                "--out",
                str(tmp_path / "r"),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    assert "may have seen episodes replayed here" in capsys.readouterr().err


def test_closed_loop_replay_has_its_own_file_and_baseline(demonstrations, tmp_path, capsys):
    arguments = ["--data", str(demonstrations), "--out", str(tmp_path), "--workers", "1"]
    assert main(["replay", "--closed-loop", "--tokenizers", "bins", *arguments]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["closed_loop.json"]
    result = json.loads((tmp_path / "closed_loop.json").read_text())
    assert list(result["tokenizers"]) == ["expert", "bins"]
    assert result["tokenizers"]["expert"]["rate"] == 1.0
    printed = capsys.readouterr().out
    assert "Closed-loop replay in metaworld, 2 demonstrations" in printed
    assert "bins against expert" in printed
