"""The artifact format: complete or unchanged, hashed, refused where edited."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

import actok
from actok.core import ActionSpace, ArtifactError, DataError, FitPart, SpaceMismatchError
from actok.core import artifact as artifact_module
from actok.core.artifact import read_artifact, write_artifact
from actok.signal.statistics import Statistics
from actok.training import fit_parts


@pytest.fixture
def tokenizer():
    actions = np.random.default_rng(0).uniform(-1, 1, (11, 5, 3)).astype(np.float32)
    return fit_parts("bins", [FitPart(actions=actions, space=ActionSpace.raw(3, "arm"))])


@pytest.fixture
def folder(tokenizer, tmp_path):
    return tokenizer.save_pretrained(tmp_path / "tok")


def test_same_files_for_the_same_tokenizer(tokenizer, tmp_path):
    a, b = tokenizer.save_pretrained(tmp_path / "a"), tokenizer.save_pretrained(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_saving_again_replaces_and_keeps_a_users_files(tokenizer, folder):
    (folder / "README.md").write_text("mine")
    tokenizer.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert actok.load(folder).weights_hash == tokenizer.weights_hash
    assert [p.name for p in folder.parent.iterdir()] == ["tok"]


def test_a_folder_of_something_else_is_not_overwritten(tokenizer, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"thesis\.tex"):
        tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_another_models_folder_is_not_overwritten(tokenizer, tmp_path):
    model = {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights"}
    for name, text in model.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json' and no tokenizer"):
        tokenizer.save_pretrained(tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == model


def test_saving_through_a_link_keeps_the_link(tokenizer, tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real")
    for _ in range(2):
        tokenizer.save_pretrained(link)
        assert link.is_symlink()
        assert actok.load(tmp_path / "real").weights_hash == tokenizer.weights_hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_another_tokenizer_leaves_nothing_of_the_one_before(tokenizer, tmp_path):
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 5, 3)).astype(np.float32)
    folder = fit_parts("fast", [FitPart(actions=actions, space=ActionSpace.raw(3, "arm"))]).save_pretrained(tmp_path)
    assert (folder / "tokenizer.json").exists()
    tokenizer.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_adapt_keeps_the_weights_hash(tokenizer):
    other = np.random.default_rng(1).uniform(-9, 9, (11, 5, 3))
    adapted = tokenizer.adapt(ActionSpace.raw(3, "other"), Statistics.from_array(other))
    assert adapted.weights_hash == tokenizer.weights_hash
    assert list(adapted.spaces) == ["arm", "other"]
    assert list(tokenizer.spaces) == ["arm"]


def test_adapt_never_replaces_an_embodiment(tokenizer):
    statistics = Statistics.from_array(np.random.default_rng(1).uniform(-9, 9, (11, 5, 3)))
    with pytest.raises(SpaceMismatchError, match="'arm' is already known"):
        tokenizer.adapt(ActionSpace.raw(3, "arm"), statistics)
    with pytest.raises(DataError, match=r"ndarray; give .*Statistics"):
        tokenizer.adapt(ActionSpace.raw(3, "other"), np.zeros((5, 3)))


def test_edited_config_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["embodiments"]["arm"]["normaliser"]["half"][0] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="edited"):
        actok.load(folder)


@pytest.mark.parametrize("keep", [0, 10, 0.5])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated_files_are_refused(folder, name, keep):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(keep if keep > 1 else len(content) * keep)])
    with pytest.raises(ArtifactError, match=r"truncated|edited|JSON"):
        actok.load(folder)


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"lacks model\.safetensors"):
        actok.load(folder)


def rewrite(folder, change):
    """Edit config.json as a later or earlier version of this library would have written it."""
    body = json.loads((folder / "config.json").read_text())
    body.pop("integrity")
    change(body)
    body["integrity"] = artifact_module.hashlib.sha256(artifact_module._canonical(body)).hexdigest()
    (folder / "config.json").write_text(json.dumps(body))


def test_a_newer_schema_is_refused(folder):
    rewrite(folder, lambda body: body.update(schema_version=artifact_module.SCHEMA_VERSION + 1))
    with pytest.raises(ArtifactError, match="upgrade actok"):
        actok.load(folder)


def test_an_older_schema_is_migrated(folder, tokenizer, monkeypatch):
    rewrite(folder, lambda body: body.update(steps=body.pop("horizon")))  # an older version called it "steps"
    monkeypatch.setattr(artifact_module, "SCHEMA_VERSION", 2)
    monkeypatch.setitem(
        artifact_module.MIGRATIONS,
        1,
        lambda body: {**{k: v for k, v in body.items() if k != "steps"}, "schema_version": 2, "horizon": body["steps"]},
    )
    assert actok.load(folder).weights_hash == tokenizer.weights_hash


def test_unknown_kind_names_the_remedy(folder):
    artifact = read_artifact(folder)
    write_artifact(replace(artifact, kind="from_the_future"), folder)
    with pytest.raises(actok.ActokError, match="from_the_future"):
        actok.load(folder)


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(ArtifactError, match="does not exist"):
        actok.load(name)


def test_hub_id_offline_says_so():
    with pytest.raises(ArtifactError, match="neither a local folder nor reachable"):
        actok.load("someone/some-tokenizer")


def test_killed_while_saving_leaves_the_old_artifact(tokenizer, folder, tmp_path):
    """A process killed again and again in the middle of saving never leaves an artifact that does not load."""
    script = (
        "import actok, sys\n"
        f"tok = actok.load({str(folder)!r})\n"
        "print('ready', flush=True)\n"
        f"while True: tok.save_pretrained({str(folder)!r})\n"
    )
    for delay in (0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        process.wait(30)
        process.stdout.close()
        assert actok.load(folder).weights_hash == tokenizer.weights_hash


def test_push_to_hub_and_load_from_it(tokenizer, tmp_path, monkeypatch):
    """One commit with exactly the files that save_pretrained writes; a Hub id loads through a snapshot of it."""
    import huggingface_hub

    uploaded = {}

    class Hub:
        def create_repo(self, repo_id, exist_ok, private):
            assert (repo_id, exist_ok, private) == ("lab/arm-bins", True, True)

        def create_commit(self, repo_id, operations, commit_message):
            uploaded.update({o.path_in_repo: o.path_or_fileobj for o in operations})
            return type("Commit", (), {"commit_url": f"hub/{repo_id}"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert tokenizer.push_to_hub("lab/arm-bins", private=True) == "hub/lab/arm-bins"
    saved = tokenizer.save_pretrained(tmp_path / "saved")
    assert uploaded == {p.name: p.read_bytes() for p in saved.iterdir()}

    def snapshot(repo_id, revision=None, **_):
        assert (repo_id, revision) == ("lab/arm-bins", "v1")
        folder = tmp_path / "snapshot"
        folder.mkdir(exist_ok=True)
        for name, content in uploaded.items():
            (folder / name).write_bytes(content)
        return str(folder)

    def no_such_file(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not a FAST+ repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_such_file)
    again = actok.load("lab/arm-bins", revision="v1")
    assert again.weights_hash == tokenizer.weights_hash
