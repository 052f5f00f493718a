"""RLDS: checksums and messages against slow, independent code; datasets written here field by field."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from actok.core import DataError, SpaceMismatchError
from actok.data import open_dataset
from actok.data.tfrecord import TFRecordFile, crc32c, feature_values, parse_example
from actok.data.video import encode_png
from realdata import REAL, needs_real

D, P, LENGTHS = 5, 3, (7, 2, 11)


# -- an independent writer --------------------------------------------------------------------------------------------


def slow_crc(content: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def masked(content: bytes) -> bytes:
    crc = slow_crc(content)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)


def record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + masked(length) + content + masked(content)


def varint(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values, packed: bool = True) -> bytes:
    if isinstance(values, list) and (not values or isinstance(values[0], bytes)):
        return field(1, b"".join(field(1, v) for v in values))
    values = np.ravel(values)
    if values.dtype.kind == "f":
        numbers = [struct.pack("<f", v) for v in values]
        body = field(1, b"".join(numbers)) if packed else b"".join(varint(1 << 3 | 5) + n for n in numbers)
        return field(2, body)
    numbers = [varint(int(v)) for v in values]
    body = field(1, b"".join(numbers)) if packed else b"".join(varint(1 << 3) + n for n in numbers)
    return field(3, body)


def example(features: dict, packed: bool = True) -> bytes:
    entries = (field(1, k.encode()) + field(2, feature(v, packed)) for k, v in features.items())
    return field(1, b"".join(field(1, e) for e in entries))


def tensor(*shape: int, dtype: str = "float32", encoding: str = "none") -> dict:
    return {"tensor": {"shape": {"dimensions": [str(n) for n in shape]}, "dtype": dtype, "encoding": encoding}}


def described(action: dict, observation: dict) -> dict:
    steps = {
        "action": action,
        "observation": {"featuresDict": {"features": observation}},
        "language_instruction": {"text": {}},
        "is_first": tensor(dtype="bool"),
    }
    inner = {"sequence": {"feature": {"featuresDict": {"features": steps}}, "length": "-1"}}
    return {"featuresDict": {"features": {"steps": inner}}}


def make_steps(seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "steps/action": rng.standard_normal((length, D)).astype(np.float32),
            "steps/observation/state": rng.standard_normal((length, P)).astype(np.float32),
            "steps/observation/image": [encode_png(i) for i in rng.integers(0, 256, (length, 6, 10, 3), np.uint8)],
            "steps/language_instruction": [f"task {number} é".encode()] * length,
            "steps/is_first": np.arange(length) == 0,
        }
        for number, length in enumerate(LENGTHS)
    ]


PLAIN = described(
    tensor(D), {"state": tensor(P), "image": {"image": {"shape": {"dimensions": ["6", "10", "3"]}, "dtype": "uint8"}}}
)


def write(folder, episodes, features=PLAIN, packed=True, shards=((0, 1), (2,))):
    """One split of two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, members in enumerate(shards):
        content = b"".join(record(example(episodes[i], packed)) for i in members)
        (folder / f"toy_set-train.tfrecord-{number:05d}-of-{len(shards):05d}").write_bytes(content)
    (folder / "features.json").write_text(json.dumps(features))
    split = {"name": "train", "shardLengths": [str(len(s)) for s in shards]}
    info = {"name": "toy_set", "splits": [split, {"name": "val", "shardLengths": ["4"]}]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


# -- checksums and messages -------------------------------------------------------------------------------------------


def test_crc_of_the_standard_vectors():
    """RFC 3720, appendix B.4."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300))
def test_crc_equals_the_bitwise_one(content):
    assert crc32c(content) == slow_crc(content)


@pytest.mark.parametrize("size", [1021, 8191, 8192, 8193, 70_001])
def test_crc_of_long_content(size):
    content = np.random.default_rng(size).bytes(size)
    assert crc32c(content) == slow_crc(content)


@settings(max_examples=60, deadline=None)
@given(
    integers=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=13),
    floats=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=11),
    texts=st.lists(st.binary(max_size=200), min_size=1, max_size=5),
    packed=st.booleans(),
)
def test_messages_come_back(integers, floats, texts, packed):
    stored = {"a/b": np.array(integers), "f": np.array(floats, np.float32), "t": texts, "": [b""]}
    flat = parse_example(memoryview(example(stored, packed)), "x")
    assert set(flat) == set(stored)
    assert feature_values(flat["a/b"], "x").tolist() == integers
    assert feature_values(flat["f"], "x").tobytes() == stored["f"].tobytes()
    assert [bytes(t) for t in feature_values(flat["t"], "x")] == texts


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_broken_messages_are_refused_or_parsed_but_never_crash(data):
    whole = bytearray(example({"steps/action": np.arange(3, dtype=np.float32), "i": np.array([1, 300])}))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = memoryview(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    try:
        for value in parse_example(cut, "somewhere").values():
            feature_values(value, "somewhere")
    except DataError:
        event("refused")


# -- datasets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_folder_of_shards(tmp_path, packed):
    episodes = make_steps()
    dataset = open_dataset(write(tmp_path / "toy_set" / "1.0.0", episodes, packed=packed))
    assert dataset.name == "toy_set"
    assert dataset.lengths.tolist() == list(LENGTHS)
    assert dataset.splits == {"train": range(3)}
    for index, read in enumerate(dataset):
        assert np.array_equal(read.actions, episodes[index]["steps/action"])
        assert np.array_equal(read.proprio, episodes[index]["steps/observation/state"])
        assert read.instruction == f"task {index} é"
    frames, offsets = dataset.all_actions()
    assert np.array_equal(frames, np.concatenate([e["steps/action"] for e in episodes]))
    assert offsets.tolist() == [0, 7, 9, 20]


def test_images_are_decoded_on_request(tmp_path):
    import av

    episodes = make_steps()
    image = np.add.outer(np.arange(6) * 20, np.arange(10) * 5).astype(np.uint8)[..., None].repeat(3, -1)
    codec = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 10, 6, "yuvj444p", 1
    codec.qmin = codec.qmax = 1
    packets = codec.encode(av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuvj444p")) + codec.encode()
    episodes[1]["steps/observation/image"] = [io.BytesIO(bytes(packets[0])).getvalue()] * 2
    dataset = open_dataset(write(tmp_path / "set", episodes))
    pictures = dataset.episode(0, images=True).images["image"]
    assert pictures.shape == (7, 6, 10, 3)
    assert encode_png(pictures[4]) == episodes[0]["steps/observation/image"][4]
    assert np.abs(dataset.episode(1, images=True).images["image"].astype(int) - image).max() < 12
    assert dataset.episode(0).images == {}


def test_dict_of_actions_is_concatenated_in_the_stated_order(tmp_path):
    rng = np.random.default_rng(3)
    sizes = {"gripper_closedness_action": 1, "rotation_delta": 3, "world_vector": 3, "arm_extra": 2}
    episodes = []
    for length in LENGTHS:
        values = {f"steps/action/{k}": rng.standard_normal((length, n)).astype("f4") for k, n in sizes.items()}
        values["steps/action/terminate_episode"] = np.zeros((length, 3), int)
        episodes.append(values | {"steps/observation/natural_language_instruction": [b"go"] * length})
    parts = {k: tensor(n) for k, n in sizes.items()} | {"terminate_episode": tensor(3, dtype="int32")}
    features = described({"featuresDict": {"features": parts}}, {"natural_language_instruction": {"text": {}}})
    del features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]["language_instruction"]  # fmt: skip
    dataset = open_dataset(write(tmp_path / "set", episodes, features))
    order = ["world_vector", "rotation_delta", "gripper_closedness_action", "arm_extra"]
    expected = np.concatenate([episodes[2][f"steps/action/{k}"] for k in order], axis=1)
    assert np.array_equal(dataset.episode(2).actions, expected)
    assert dataset.episode(2).instruction == "go"
    assert dataset.space.dim == 9
    assert dataset.space.names[6:8] == ("gripper_closedness_action", "arm_extra.0")


@pytest.mark.parametrize("encoding", ["zlib", "bytes"])
def test_tensors_stored_as_bytes(tmp_path, encoding):
    episodes = make_steps()
    actions = [e["steps/action"].astype(np.float64) * np.pi for e in episodes]
    pack = zlib.compress if encoding == "zlib" else bytes
    for episode, action in zip(episodes, actions, strict=True):
        episode["steps/action"] = [pack(step.tobytes()) for step in action]
    features = described(tensor(D, dtype="float64", encoding=encoding), {"state": tensor(P)})
    dataset = open_dataset(write(tmp_path / "set", episodes, features))
    assert dataset.lengths.tolist() == list(LENGTHS)
    assert np.array_equal(dataset.episode(2).actions, actions[2].astype(np.float32))


def test_one_file_and_a_glob(tmp_path):
    folder = write(tmp_path / "set", make_steps())
    first, second = sorted(folder.glob("*.tfrecord*"))
    assert open_dataset(second).lengths.tolist() == [11]
    assert open_dataset(str(folder / "*.tfrecord-0000[0-1]-*")).lengths.tolist() == list(LENGTHS)
    assert open_dataset(str(first)).lengths.tolist() == [7, 2]


# -- damage -----------------------------------------------------------------------------------------------------------


def test_one_flipped_bit_in_a_record(tmp_path):
    folder = write(tmp_path / "set", make_steps())
    shard = sorted(folder.glob("*.tfrecord*"))[0]
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1  # in the second record
    shard.write_bytes(content)
    dataset = open_dataset(folder)
    assert len(dataset.episode(0)) == 7
    for read in (lambda: dataset.episode(1), dataset.all_actions):
        with pytest.raises(DataError, match="record 1 has a wrong checksum"):
            read()


@pytest.mark.parametrize("keep", [3, 14, -1, -2000])
def test_truncated_file(tmp_path, keep):
    folder = write(tmp_path / "set", make_steps())
    shard = sorted(folder.glob("*.tfrecord*"))[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"00000-of-00002 is truncated in record [01]"):
        open_dataset(folder)


def test_not_a_tfrecord(tmp_path):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(b"this is no TFRecord file at all")
    with pytest.raises(DataError, match="length of record 0 has a wrong checksum"):
        TFRecordFile(path)


def test_missing_and_contradictory_files(tmp_path):
    folder = write(tmp_path / "set", make_steps())
    shards = sorted(folder.glob("*.tfrecord*"))
    kept = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(DataError, match="has 1 of 2 shards"):
        open_dataset(folder)
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(DataError, match=r"holds 2 episodes, dataset_info\.json states 1"):
        open_dataset(folder)
    shards[1].write_bytes(kept)
    with pytest.raises(SpaceMismatchError, match="has actions of 5 dimensions"):
        open_dataset(folder, space="metaworld_sawyer")
    (folder / "features.json").unlink()
    with pytest.raises(DataError, match=r"features\.json is missing"):
        open_dataset(folder)
    for shard in shards:
        shard.unlink()
    with pytest.raises(DataError, match="only metadata"):
        open_dataset(folder)


@pytest.mark.parametrize("info", [[], {"splits": 3}, {"splits": [{}]}, {"splits": [{"name": "a", "shardLengths": 1}]}])
def test_dataset_info_of_the_wrong_form_is_named(tmp_path, info):
    folder = write(tmp_path / "set", make_steps())
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"dataset_info\.json is not as TFDS writes it .* download it again"):
        open_dataset(folder)


def test_empty_and_wrong_contents(tmp_path):
    empty = write(tmp_path / "empty", make_steps(), shards=((), ()))
    with pytest.raises(DataError, match="is empty"):
        open_dataset(empty)
    with pytest.raises(DataError, match="holds 35 values, no multiple of 4"):
        open_dataset(write(tmp_path / "wide", make_steps(), described(tensor(4), {})))
    with pytest.raises(DataError, match="no floating point 'steps/action'"):
        open_dataset(write(tmp_path / "none", make_steps(), described({"text": {}}, {"state": tensor(P)})))
    short = make_steps()
    short[1]["steps/observation/state"] = short[1]["steps/observation/state"][:1]
    with pytest.raises(DataError, match="state holds 3 values for 2 steps"):
        open_dataset(write(tmp_path / "short", short)).episode(1)
    poisoned = make_steps()
    poisoned[2]["steps/action"][9, 4] = np.nan
    dataset = open_dataset(write(tmp_path / "nan", poisoned))
    for read in (lambda: dataset.episode(2), dataset.all_actions):
        with pytest.raises(DataError, match="'toy_set' holds nan in episode 2, step 9, dimension 4"):
            read()


# -- real data --------------------------------------------------------------------------------------------------------


@needs_real
def test_real_bridge():
    dataset = open_dataset(REAL / "real/bridge_widowx")
    assert dataset.lengths.tolist() == [10] * 25
    assert dataset.space.embodiment == "bridge_widowx"
    assert dataset.space.rate_hz == 5
    frames, _ = dataset.all_actions()
    assert frames.shape == (250, 7)
    # Small metric displacements, and a gripper between 0 and 1: another order or layout of the dimensions shows here.
    assert np.abs(frames[:, :3]).max() < 0.1
    assert (frames[:, 6].min() >= 0, frames[:, 6].max() > 0.9, frames[:, 6].max() < 1.1) == (True, True, True)
    episode = dataset.episode(24, images=True)
    assert episode.instruction == "put carrot on plate"
    assert {v.shape for v in episode.images.values()} == {(10, 64, 64, 3)}
    assert episode.images["image_0"].std() > 10
    for index in range(len(dataset)):
        file, number = dataset._records[index]
        content = bytes(file.record(number))
        assert crc32c(content[:999]) == slow_crc(content[:999])
