"""Images of a policy's demonstrations: what the files of the cache folder give is what memory gives, and when they are made."""

import contextlib
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import actok
from actok.core import ActionGroup, ActionSpace, DataError
from actok.data import Episode, EpisodeDataset, open_dataset, write_lerobot
from actok.training import policy_images
from actok.training.policy_data import PolicyData
from actok.training.policy_images import read_images

SIZES = {"top": (5, 7), "arm/left": (3, 2)}
LENGTHS = (11, 2, 13, 5)
SPACE = ActionSpace(
    embodiment="arm", dim=2, groups=(ActionGroup(name="move", kind="position", dims=(0, 1), mode="delta", unit="m"),)
)


class Films(EpisodeDataset):
    """Episodes of random images; it counts how often each was read with its images."""

    def __init__(self, folder: Path | None, name: str = "films", seed: int = 0, lengths=LENGTHS, sizes=None) -> None:
        rng = np.random.default_rng(seed)
        self.name, self.lengths = name, np.array(lengths)
        self.space, self.space_origin = SPACE, "here"
        self.films = [
            {v: rng.integers(0, 256, (n, *s, 3)).astype(np.uint8) for v, s in (sizes or SIZES).items()} for n in lengths
        ]
        self.read: list[int] = []
        if folder is not None:
            folder.mkdir(exist_ok=True)
            self.source_files = [folder / f"{name}.bin"]
            self.clips = {view: folder / f"{name}-{view.replace('/', '-')}.mp4" for view in SIZES}
            for path in [*self.source_files, *self.clips.values()]:
                path.write_bytes(b"1")

    def video_files(self, views):
        return [self.clips[view] for view in views]

    def episode(self, index, *, images=False):
        if images:
            self.read.append(index)
        return Episode(
            index=index,
            actions=np.zeros((int(self.lengths[index]), 2), np.float32),
            images=self.films[index] if images else {},
        )

    def at(self, frames: np.ndarray, view: str) -> np.ndarray:
        """What `Images.at` is to give."""
        return np.concatenate([film[view] for film in self.films])[frames]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def films(tmp_path):
    return Films(tmp_path / "data")


EPISODES = np.array([3, 0, 2])


def files(cache: Path) -> dict[str, Path]:
    """Finished files by the view in their name."""
    found = [path for path in cache.iterdir() if not path.name.startswith(".")]
    return {path.name.split("-")[1]: path for path in found}


def frames_of(dataset: Films, episodes) -> np.ndarray:
    offsets = np.concatenate([[0], np.cumsum(dataset.lengths)])
    return np.concatenate([np.arange(offsets[e], offsets[e + 1]) for e in episodes])


def right(images, dataset: Films, episodes=EPISODES, views=tuple(SIZES)) -> bool:
    """Whether every frame comes back as it is, in whatever order it is asked for, as a copy of its own."""
    frames = np.random.default_rng(1).permutation(np.repeat(frames_of(dataset, episodes), 2))
    found = images.at(frames)
    return (
        list(found) == list(views)
        and all(np.array_equal(found[view], dataset.at(frames, view)) for view in views)
        and all(pixels.dtype == np.uint8 and pixels.flags.writeable for pixels in found.values())
    )


def read(dataset: Films, episodes=EPISODES, views=tuple(SIZES), **options):
    (found,) = read_images([dataset], [episodes], views, progress=False, **options)
    return found


# -- the same, mapped or not ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [("top",), ("top", "arm/left"), ("arm/left", "top")])
def test_mapped_images_are_those_in_memory_for_every_frame(tmp_path, monkeypatch, views):
    datasets = [Films(tmp_path / "data"), Films(tmp_path / "data", "more", seed=3, lengths=(17, 1))]
    episodes = [EPISODES, np.array([1, 0])]
    held = read_images(datasets, episodes, views, progress=False)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("ACTOK_CACHE", str(tmp_path / "cache"))
    mapped = read_images(datasets, episodes, views, progress=False)
    for dataset, chosen, one, other in zip(datasets, episodes, held, mapped, strict=True):
        assert right(one, dataset, chosen, views)
        assert right(other, dataset, chosen, views)
        assert np.array_equal(one.rows, other.rows)
        assert not any(pixels.flags.writeable for pixels in other.pixels.values())
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2 * len(views)


def test_a_policy_is_trained_on_the_same_images_from_a_file(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(11, 19, 20)
    count = int(lengths.sum())
    np.savez(
        tmp_path / "demos.npz",
        action=rng.normal(size=(count, 3)).astype("float32"),
        image=rng.integers(0, 256, (count, 4, 6, 3)).astype("uint8"),
        episode_length=lengths,
        task="reach",
    )
    bins = actok.fit("bins", str(tmp_path / "demos.npz"), horizon=5, bins=7)
    held = PolicyData.build(str(tmp_path / "demos.npz"), bins, views=["image"], progress=False)
    monkeypatch.setenv("ACTOK_CACHE", str(tmp_path / "cache"))
    mapped = PolicyData.build(str(tmp_path / "demos.npz"), bins, views=["image"], progress=False)
    assert mapped.image_sizes == held.image_sizes == {"image": [4, 6]}
    for one, other in ((held.train, mapped.train), (held.validation, mapped.validation)):
        chosen = rng.permutation(len(one))
        assert np.array_equal(
            one.batch(chosen).observation.images["image"], other.batch(chosen).observation.images["image"]
        )
    assert len(list((tmp_path / "cache").glob("demos-image-*.safetensors"))) == 1


def test_a_file_is_one_that_safetensors_reads(cache, films):
    read(films)
    for view, path in (("top", files(cache)["top"]), ("arm/left", files(cache)["arm_left"])):
        assert np.array_equal(load_file(path)["pixels"], films.at(frames_of(films, sorted(EPISODES)), view))


# -- reuse ------------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_read_again(cache, films):
    read(films)
    assert films.read == [3, 0, 2, 3]  # one for the names and sizes of the views
    before = {path: path.stat().st_mtime_ns for path in files(cache).values()}
    for views in (("top", "arm/left"), ("arm/left", "top"), ("arm/left",)):
        films.read.clear()
        assert right(read(films, EPISODES[::-1], views), films, views=views)
        assert films.read == [2]
    assert {path: path.stat().st_mtime_ns for path in files(cache).values()} == before


def test_a_further_view_is_read_and_the_others_stay(cache, films):
    read(films, views=("top",))
    before = files(cache)["top"].stat().st_mtime_ns
    assert right(read(films), films)
    assert files(cache)["top"].stat().st_mtime_ns == before


def cut(path: Path) -> None:
    with open(path, "rb+") as stream:
        stream.truncate(path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with open(path, "ab") as stream:
        stream.write(b"0")


def of_another_kind(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(bytes(size))


def of_another_key(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"key": "', b'"key": "0', 1)[: len(content)])


@pytest.mark.parametrize("damage", [cut, lengthen, of_another_kind, of_another_key])
def test_a_damaged_file_is_made_anew_and_alone(cache, films, damage):
    read(films)
    good = {view: path.read_bytes() for view, path in files(cache).items()}
    untouched = files(cache)["arm_left"].stat().st_mtime_ns
    damage(files(cache)["top"])
    assert right(read(films), films)
    assert {view: path.read_bytes() for view, path in files(cache).items()} == good
    assert files(cache)["arm_left"].stat().st_mtime_ns == untouched


def test_other_data_have_another_file(cache, films, tmp_path):
    def count() -> int:
        return len(list(cache.glob("films-top-*.safetensors")))

    def changed(episodes=EPISODES, dataset=films) -> int:
        before = count()
        assert right(read(dataset, episodes, ("top",)), dataset, episodes, ("top",))
        return count() - before

    assert changed() == 1
    assert changed(EPISODES[:2]) == 1
    films.films = [{view: 255 - pixels for view, pixels in film.items()} for film in films.films]
    os.utime(films.source_files[0], ns=(1, 1))
    assert changed() == 1
    films.films = [{view: pixels // 2 for view, pixels in film.items()} for film in films.films]
    films.clips["top"].write_bytes(b"22")
    assert changed() == 1
    films.clips["arm/left"].write_bytes(b"333")  # another view's
    assert changed() == 0
    films.selection = [5, 6, 7, 8]
    assert changed() == 1
    assert changed(dataset=Films(tmp_path / "data", seed=9, sizes={"top": (2, 3)})) == 1
    assert changed(dataset=Films(tmp_path / "elsewhere", seed=8)) == 1


@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_lerobot_dataset_is_read_anew_when_the_files_that_hold_its_images_change(cache, tmp_path, kind):
    if kind == "video":
        pytest.importorskip("av")
    source = Films(None, sizes={"top": (16, 32)})
    episodes = [source.episode(e, images=True) for e in range(len(source))]
    folder = write_lerobot(episodes, tmp_path / "set", space=SPACE, rate_hz=10.0, subtask_layout=None, images=kind)
    dataset = open_dataset(folder)
    (view,) = dataset.view_sizes()
    (mapped,) = read_images([dataset], [EPISODES], ["top"], progress=False)
    for e in EPISODES:
        frames = frames_of(source, [e])
        assert np.array_equal(mapped.at(frames)[view], dataset.episode(int(e), images=True).images[view])
    (holding,) = {*folder.rglob("*.mp4")} if kind == "video" else {*(folder / "data").rglob("*.parquet")}
    os.utime(holding, ns=(1, 1))
    read_images([open_dataset(folder)], [EPISODES], ["top"], progress=False)
    assert len(list(cache.glob("*.safetensors"))) == 2


# -- memory and disk --------------------------------------------------------------------------------------------------


def test_data_in_memory_stay_there_and_are_limited(cache, films, monkeypatch):
    arrays = Films(None, "arrays", seed=5)
    first, second = read_images([films, arrays], [EPISODES, EPISODES], tuple(SIZES), progress=False)
    assert right(first, films)
    assert right(second, arrays)
    assert [path.name[:5] for path in files(cache).values()] == ["films"] * 2
    monkeypatch.setattr(policy_images, "MOST_BYTES", second.pixels["top"].nbytes + second.pixels["arm/left"].nbytes)
    read_images([films, arrays], [EPISODES, EPISODES], tuple(SIZES), progress=False)  # what is mapped does not count
    monkeypatch.setattr(policy_images, "MOST_BYTES", policy_images.MOST_BYTES - 1)
    arrays.read.clear()
    with pytest.raises(DataError, match=r"write arrays to files, of which a cache can be made, and let .* ACTOK_CACHE"):
        read_images([films, arrays], [EPISODES, EPISODES], tuple(SIZES), progress=False)
    assert arrays.read == [3]


def test_what_memory_cannot_hold_is_refused_with_the_way_to_a_file(films, tmp_path, monkeypatch):
    monkeypatch.delenv("ACTOK_CACHE", raising=False)
    monkeypatch.setattr(policy_images, "MOST_BYTES", 3000)
    told = (
        r"29 frames of top \(7 x 5\), arm/left \(2 x 3\) take 0.0 GB, more than the 0 GB .* take in memory; let the env"
    )
    with pytest.raises(DataError, match=told):
        read(films)
    assert films.read == [3]
    monkeypatch.setenv("ACTOK_CACHE", str(tmp_path / "cache"))
    assert right(read(films), films)


def test_a_disk_without_room_is_refused_before_anything_is_read(cache, films, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(9**9, 0, 29 * (5 * 7 + 3 * 2) * 3 - 1))
    with pytest.raises(
        DataError, match=r"29 frames of top, arm/left .* take 0.0 GB, .*cache has 0.0 GB free; let ACTOK_C"
    ):
        read(films)
    assert films.read == [3]
    assert not files(cache)
    assert right(read(films, views=("top",)), films, views=("top",))
    assert right(read(films), films)  # less is missing now


def test_a_disk_that_becomes_full_leaves_no_file(cache, films, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no device that is always full")
    monkeypatch.setattr(policy_images, "atomic_path", lambda path: contextlib.nullcontext("/dev/full"))
    with pytest.raises(DataError, match=r"became full while images of 'films' were written \(No space left"):
        read(films)
    assert not files(cache)


# -- several processes, and ends --------------------------------------------------------------------------------------


def test_an_interruption_leaves_nothing_and_the_next_run_clears_what_a_kill_left(cache, films, monkeypatch):
    original = films.episode

    def interrupted(index, *, images=False):
        if len(films.read) == 3:
            raise KeyboardInterrupt
        return original(index, images=images)

    monkeypatch.setattr(films, "episode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(films)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(films, "episode", original)
    read(films)
    left = cache / f".{files(cache)['top'].name}-killed.safetensors"
    left.write_bytes(b"half")
    read(films)
    assert left.exists()  # nothing was to be written
    files(cache)["top"].unlink()
    assert right(read(films), films)
    assert not left.exists()


def test_of_several_that_ask_at_once_one_reads(cache, tmp_path, monkeypatch):
    """A second one comes while the first is in the middle of its files; it waits, and then has them without reading."""
    one, two = Films(tmp_path / "data"), Films(tmp_path / "data")
    began, waiting = threading.Event(), threading.Event()
    original = one.episode

    def slow(index, *, images=False):
        if len(one.read) == 2:
            began.set()
            assert waiting.wait(20)
        return original(index, images=images)

    def told(message, stream):
        if "waiting for another process" in message:
            waiting.set()

    monkeypatch.setattr(one, "episode", slow)
    monkeypatch.setattr(policy_images.tqdm, "write", told)
    found = {}

    def first():
        found["one"] = read(one)

    thread = threading.Thread(target=first)
    thread.start()
    assert began.wait(20)
    assert not files(cache)
    (found["two"],) = read_images([two], [EPISODES], tuple(SIZES), progress=True)
    thread.join(20)
    assert (one.read, two.read) == ([3, 0, 2, 3], [3])
    assert right(found["one"], one)
    assert right(found["two"], two)
