"""ONNX files of learned tokenizers: they do what the tokenizer does, in raw units, and report what it refuses."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import actok
from actok.core import ChunkContext, MissingExtraError, tokenizer_presets
from actok.core.registry import load_target
from actok.tokenizers.export import ExportError, export_onnx

pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

T = 11
# Networks as flat as they get, since tracing takes time with every layer; anything else is the preset's.
SHALLOW = {
    "oat": {"encoder_depth": 1, "decoder_depth": 1},
    "quest": {"encoder_depth": 1, "decoder_depth": 1},
    "vqvla": {"widths": (16, 16), "blocks": (1, 1)},
    "actioncodec": {"depth": 1},
    "carp": {"depth": 1},
}
# Tracing follows every operation, and shape checks would be among them: it runs in a process without them.
SCRIPT = """
import json, sys
import numpy as np, torch
torch.set_num_threads(1)
from actok.core import ActionGroup, ActionSpace, FitPart, build_config, find_preset
from actok.core.registry import load_target
from actok.signal.statistics import Statistics
from actok.tokenizers.export import ExportError, export_onnx

T, folder, wanted = 11, sys.argv[1], json.loads(sys.argv[2])
groups = (
    ActionGroup(name="g", kind="gripper", dims=(3,)),
    ActionGroup(name="p", kind="position", dims=(5, 0, 9), unit="m", scale=0.05, mode="delta"),
    ActionGroup(name="six", kind="rotation", rotation="rot6d", dims=(1, 2, 4, 6, 7, 8)),
    ActionGroup(name="turn", kind="rotation", rotation="quaternion_wxyz", dims=(10, 11, 12, 13)),
    ActionGroup(name="q", kind="joint", dims=(14, 15, 16)),
)
arm = ActionSpace(embodiment="arm", dim=17, groups=groups, rate_hz=30.0)
rng = np.random.default_rng(0)
x = rng.normal(size=(37, T, 17)).astype(np.float32)
x[:, :, 14] = 2.5 + 0.01 * x[:, :, 14]  # a small motion about a large offset
x[:, :, 15] = 0.7  # never changes
parts = [
    FitPart(actions=rng.normal(size=(37, T, 5)).astype(np.float32), space=ActionSpace.raw(5, "plain")),
    FitPart(actions=x, space=arm),
]
outcome = {}
for name, settings in wanted.items():
    preset = find_preset(name)
    target = load_target(preset.target)
    config = build_config(target.config_class, {**preset.settings, **settings}, name)
    tokenizer = target.prepare(parts, config)
    if target.kind == "omnisat":
        tokenizer = tokenizer.finish(parts)
    tokenizer.save_pretrained(f"{folder}/{name}/tokenizer")
    try:
        export_onnx(tokenizer, f"{folder}/{name}/onnx", embodiment="arm")
        outcome[name] = "exported"
    except ExportError as error:
        outcome[name] = str(error)
print(json.dumps(outcome))
"""


def one_of_each_kind() -> dict[str, str]:
    """The smallest preset of each learned class of the registry."""
    found = {}
    for name, preset in sorted(tokenizer_presets().items(), key=lambda item: not item[0].endswith("-tiny")):
        target = load_target(preset.target)
        if target.learned and preset.target.startswith("actok.") and not target.codec_class.reads_state:
            found.setdefault(target.kind, name)
    return found


KINDS = one_of_each_kind()
# Levels first; codes of absent channels left out; one latent; variable length. The others differ in their networks only.
FIRST = [KINDS[kind] for kind in ("fastervq", "carp", "vqbet", "omnisat")]
OTHERS = sorted(set(KINDS.values()) - set(FIRST))


def export_of(names: list[str], folder: Path) -> dict[str, str]:
    """What came of exporting each: a tokenizer of two embodiments, exported for the second."""
    wanted = {name: SHALLOW.get(kind, {}) for kind, name in KINDS.items() if name in names}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), json.dumps(wanted)],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    return folder, export_of(FIRST, folder)


@pytest.fixture(scope="module")
def others_exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    return folder, export_of(OTHERS, folder)


def opened(folder: Path, name: str):
    """The tokenizer, and its two files as functions."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def function(file, given):
        session = onnxruntime.InferenceSession(str(folder / name / "onnx" / file), options)
        return lambda values: session.run(None, {given: values})

    return (
        actok.load(folder / name / "tokenizer"),
        function("encoder.onnx", "actions"),
        function("decoder.onnx", "ids"),
    )


def raw_chunks(tokenizer, count: int, seed: int = 3) -> np.ndarray:
    """Random chunks, some of them out of range, in the units of the data."""
    normaliser = tokenizer.embodiment("arm").normaliser
    y = np.random.default_rng(seed).uniform(-1.2, 1.2, (count, T, 17))
    return normaliser.inverse(np.where(normaliser.constant, 0.0, y)).astype(np.float32)


def random_ids(tokenizer, count: int, seed: int = 5) -> np.ndarray:
    vocab = tokenizer.layout_for(None, "arm").vocab
    return np.random.default_rng(seed).integers(0, vocab, (count, len(vocab)))


ARM = ChunkContext(embodiment="arm")


@pytest.mark.parametrize("name", FIRST[:3])
@pytest.mark.parametrize("batch", [1, 7])
def test_files_do_what_the_tokenizer_does(exported, name, batch):
    check(*exported, name, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("batch", [1, 7])
def test_files_of_every_other_kind_do_too(others_exported, name, batch):
    check(*others_exported, name, batch)


def check(folder: Path, outcome: dict[str, str], name: str, batch: int) -> None:
    assert outcome[name] == "exported"
    tokenizer, encode, decode = opened(folder, name)
    chunks, normaliser = raw_chunks(tokenizer, batch), tokenizer.embodiment("arm").normaliser
    ids, out_of_range = encode(chunks)
    tokens = tokenizer.encode(chunks, ARM)
    np.testing.assert_array_equal(ids, tokens.ids)
    np.testing.assert_array_equal(out_of_range, tokens.out_of_range)
    assert out_of_range.all()

    some = random_ids(tokenizer, batch)
    actions, valid = decode(some)
    expected = tokenizer.decode(some, ARM).actions
    assert valid.all()
    turning = [d for g in tokenizer.spaces["arm"].groups if g.kind == "rotation" for d in g.dims]
    plain = [d for d in range(17) if d not in turning]
    # 1e-5 in normalised units, and the last digit of a raw float32.
    allowed = 1e-5 * normaliser.half + 2 * np.spacing(np.abs(expected))
    assert (np.abs(actions - expected) <= allowed)[:, :, plain].all()
    np.testing.assert_allclose(actions[:, :, turning], expected[:, :, turning], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(actions[:, :, 15], np.float32(0.7))


def test_rotations_come_out_proper_and_values_within_the_limits(exported):
    tokenizer, _, decode = opened(exported[0], KINDS["fastervq"])
    actions, _ = decode(random_ids(tokenizer, 13))
    first, second = actions[:, :, [1, 2, 4]], actions[:, :, [6, 7, 8]]
    np.testing.assert_allclose((first**2).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose((second**2).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose((first * second).sum(-1), 0, atol=1e-5)
    np.testing.assert_allclose((actions[:, :, 10:14] ** 2).sum(-1), 1, atol=1e-5)
    low, high = tokenizer.embodiment("arm").normaliser.limits.astype(np.float32)
    plain = [0, 3, 5, 9, 14, 15, 16]
    assert ((actions >= low) & (actions <= high))[:, :, plain].all()


def test_what_the_tokenizer_refuses_is_reported(exported):
    tokenizer, encode, decode = opened(exported[0], KINDS["fastervq"])
    chunks = tokenizer.embodiment("arm").normaliser.inverse(np.zeros((3, T, 17), np.float32))
    chunks[1, 4, 3] = np.nan
    chunks[2, 5:7, 0] = np.inf
    assert encode(chunks)[1].tolist() == [0, 1, 2]

    ids = random_ids(tokenizer, 5)
    good, _ = decode(ids)
    broken = ids.copy()
    broken[1, 3], broken[4, 0] = -1, tokenizer.vocab_size
    actions, valid = decode(broken)
    assert valid.tolist() == [True, False, True, True, False]
    assert np.isnan(actions[[1, 4]]).all()
    np.testing.assert_array_equal(actions[[0, 2, 3]], good[[0, 2, 3]])


def test_the_files_say_what_they_are(exported):
    folder = exported[0] / KINDS["fastervq"]
    tokenizer = actok.load(folder / "tokenizer")
    facts = json.loads((folder / "onnx" / "export.json").read_text())
    assert facts["weights_hash"] == tokenizer.weights_hash
    assert facts["embodiment"] == "arm"
    assert facts["vocab"] == tokenizer.layout_for(None, "arm").vocab.tolist()
    assert [d["name"] for d in facts["dimensions"]] == list(tokenizer.spaces["arm"].names)
    assert facts["dimensions"][5] | {"limits": None} == {
        "name": "p.0",
        "kind": "position",
        "unit": "m",
        "scale": 0.05,
        "mode": "delta",
        "incremental": True,
        "limits": None,
    }
    assert facts["agreement"]["ids_compared"] > 0.9
    for file, described in facts["files"].items():
        content = (folder / "onnx" / file).read_bytes()
        assert described["sha256"] == hashlib.sha256(content).hexdigest()
        assert str(Path(actok.__file__).parent).encode() not in content  # no path of the machine that made it
        session = onnxruntime.InferenceSession(content)
        for told, found in (
            (described["inputs"], session.get_inputs()),
            (described["outputs"], session.get_outputs()),
        ):
            assert [(v["name"], v["shape"]) for v in told] == [(v.name, v.shape) for v in found]
        assert session.get_modelmeta().custom_metadata_map["weights_hash"] == tokenizer.weights_hash


def test_sequences_of_variable_length_are_refused(exported):
    folder, outcome = exported
    name = KINDS["omnisat"]
    assert "variable length" in outcome[name]
    assert not (folder / name / "onnx").exists()


def test_closed_form_tokenizers_are_refused(tmp_path, capsys):
    from actok.cli import main

    tokenizer = actok.fit("dct", np.random.default_rng(0).normal(size=(17, 5, 3)).astype(np.float32))
    with pytest.raises(ExportError, match="closed form"):
        export_onnx(tokenizer, tmp_path / "onnx")
    tokenizer.save_pretrained(tmp_path / "t")
    assert main(["export", str(tmp_path / "t"), "--out", str(tmp_path / "onnx")]) == 1
    assert "closed form" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def test_a_missing_extra_is_named(exported, tmp_path, monkeypatch):
    tokenizer = actok.load(exported[0] / KINDS["vqbet"] / "tokenizer")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"actok\[onnx\]"):
        export_onnx(tokenizer, tmp_path / "onnx")


@pytest.mark.parametrize("which", ["encoder", "decoder"])
def test_a_file_that_does_not_agree_is_not_written(exported, tmp_path, monkeypatch, which):
    """The files of other weights stand in for an export gone wrong."""
    from actok.tokenizers import export

    tokenizer = actok.load(exported[0] / KINDS["vqbet"] / "tokenizer")
    files = {f: (exported[0] / KINDS["vqbet"] / "onnx" / f"{f}.onnx").read_bytes() for f in ("encoder", "decoder")}
    state = {k: v + 0.01 for k, v in tokenizer.codec.state_dict().items() if k.startswith(which)}
    changed = tokenizer.with_weights({**tokenizer.codec.state_dict(), **state})
    monkeypatch.setattr(
        export, "_trace", lambda graph, *_: files["encoder" if "Encoder" in type(graph).__name__ else "decoder"]
    )
    with pytest.raises(ExportError, match=f"the {which}'s"):
        export_onnx(changed, tmp_path / "onnx", embodiment="arm")
    assert not (tmp_path / "onnx").exists()
