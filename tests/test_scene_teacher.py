"""The small vision-language teacher: it learns what images and words have in common, and keeps it on disk."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from actok.alignment.scene import (
    SceneConfig,
    SceneModel,
    SceneTeacher,
    Vocabulary,
    contrastive_loss,
    load_scene,
    resize,
    save_scene,
)
from actok.alignment.teacher import load_teacher
from actok.cli import main
from actok.core import ArtifactError, ConfigError, DataError
from actok.data import open_dataset
from actok.data.arrays import from_arrays
from actok.training import TrainingError
from actok.training.teacher import TeacherTraining, _retrieval, train_teacher
from actok.training.teacher_frames import Frames, read_frames
from realdata import REAL, needs_real

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
PLACES = {"left": (11, 3), "right": (11, 19)}
SMALL = SceneConfig(image_size=16, channels=(8, 16), text_width=16, text_depth=1, heads=2, dim=24)
TINY = TeacherTraining(steps=3, batch_size=7)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def world(episodes: int = 12, steps: int = 23):
    """The squares as a dataset."""
    return from_arrays(squares(episodes, steps), name="squares")


def squares(episodes: int, steps: int, size: int = 28) -> dict:
    """Episodes that push a square of one colour first to one side, then to the other, on a noisy ground."""
    rng = np.random.default_rng(3)
    images, phases, said = [], [], []
    for e in range(episodes):
        colour = list(COLOURS)[e % 3]
        said.append(f"push the {colour} square")
        for t in range(steps):
            phase = int(t >= steps // 2)
            picture = rng.integers(60, 120, (size, size, 3))
            y, x = list(PLACES.values())[phase] + rng.integers(-2, 3, 2)
            picture[y : y + 7, x : x + 7] = COLOURS[colour]
            images.append(picture)
            phases.append(phase)
    return {
        "action": rng.normal(size=(episodes * steps, 3)).astype(np.float32),
        "episode_length": np.full(episodes, steps),
        "image": np.stack(images).astype(np.uint8),
        "phase": np.array(phases),
        "phase_names": np.array(["go left", "go right"]),
        "instruction": np.array(said),
        "control_hz": 20.0,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("scene") / "teacher"
    training = TeacherTraining(steps=90, batch_size=32, learning_rate=3e-3)
    return train_teacher(world(), folder, training=training, config=SMALL, device="cpu", progress=False)


def test_held_out_images_find_their_words(trained):
    found = trained.held_out
    assert found.texts == 6
    assert found.frames == 2 * 23
    assert found.recall_1 > 0.9
    assert found.phase > 0.9 > found.phase_usual
    facts = json.loads((trained.folder / "config.json").read_text())["training"]
    assert facts["held_out"]["recall_1"] == found.recall_1
    assert facts["data"] == [{"name": "squares", "episodes": 12, "frames": 276, "views": ["image"]}]
    assert trained.episodes == 10
    assert trained.frames == trained.images == 230
    assert "R@1" in str(found)


def test_same_arguments_give_the_same_teacher_and_another_seed_another(tmp_path):
    hashes = []
    for i, seed in enumerate((5, 5, 6)):
        torch.manual_seed(i)  # what the caller did with the global generator does not matter
        report = train_teacher(
            world(5, 7),
            tmp_path / str(i),
            training=replace(TINY, seed=seed),
            config=SMALL,
            device="cpu",
            progress=False,
        )
        hashes.append(load_scene(report.folder)[1])
    assert hashes[0] == hashes[1] != hashes[2]


def test_training_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    train_teacher(world(5, 7), tmp_path / "t", training=TINY, config=SMALL, device="cpu", progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- as a teacher -------------------------------------------------------------------------------------------------


def pictures(episode: int) -> tuple[str, np.ndarray]:
    """The text and the images of the first phase of one episode of the world."""
    found = world().episode(episode, images=True)
    return f"{found.instruction}. Current step: go left.", found.images["image"][:11]


def test_image_and_text_lie_near_the_text_alone_and_far_from_another(trained):
    teacher = load_teacher(trained.folder)
    assert isinstance(teacher, SceneTeacher)
    (one, images), (other, _) = pictures(0), pictures(1)
    both = teacher.encode([one] * 11, [images])
    own, foreign = both @ teacher.encode([one])[0], both @ teacher.encode([other])[0]
    assert own.min() > foreign.max() + 0.2
    assert np.allclose(np.linalg.norm(both, axis=1), 1, atol=1e-6)


def test_features_of_a_batch_are_those_of_singles_and_the_same_each_time(trained):
    teacher = load_teacher(trained.folder)
    (one, images), (other, more) = pictures(0), pictures(1)
    texts, views = [one, other, one], [np.concatenate([images[:2], more[:1]]), None, more[:3]]
    whole = teacher.encode(texts, views)
    singles = [teacher.encode([texts[i]], [None if v is None else v[i : i + 1] for v in views])[0] for i in range(3)]
    assert np.allclose(whole, np.stack(singles), atol=1e-6)
    assert np.array_equal(whole, load_teacher(trained.folder).encode(texts, views))
    assert not np.allclose(whole, teacher.encode(texts, views[:1]), atol=1e-3)


def test_identity_follows_the_content_and_not_the_place(trained, tmp_path):
    here = load_teacher(trained.folder).identity
    there = load_teacher(shutil.copytree(trained.folder, tmp_path / trained.folder.name)).identity
    assert here == there
    assert json.loads(json.dumps(here)) == here
    assert str(trained.folder) not in json.dumps(here)


# -- the model ----------------------------------------------------------------------------------------------------


def model(seed: int = 0, config: SceneConfig = SMALL) -> SceneModel:
    torch.manual_seed(seed)
    return SceneModel(config, Vocabulary.fit(["push the red square", "open the drawer 2"])).eval()


@torch.no_grad()
def test_texts_in_a_batch_are_texts_alone():
    scene = model()
    words = [scene.vocabulary.rows(t) for t in ("push", "open the red drawer, then push the square", "drawer 2")]
    alone = torch.cat([scene.text([w]) for w in words])
    assert torch.allclose(scene.text(words), alone, atol=1e-6)
    assert torch.allclose(alone.norm(dim=1), torch.ones(3))


@torch.no_grad()
def test_the_order_of_words_matters():
    scene = model()
    one, other = (scene.text([scene.vocabulary.rows(t)]) for t in ("push the drawer red", "red the drawer push"))
    assert (one - other).abs().max() > 1e-4


@torch.no_grad()
def test_an_absent_view_is_not_looked_at_and_a_present_one_is():
    scene, rng = model(), np.random.default_rng(1)
    images = torch.from_numpy(rng.integers(0, 256, (5, 3, 16, 16, 3), dtype=np.uint8))
    present = torch.tensor([[1, 0, 1]] * 5, dtype=torch.bool)
    other = images.clone()
    other[:, 1] = 0
    assert torch.equal(scene.image(images, present), scene.image(other, present))
    assert not torch.allclose(scene.image(images, present), scene.image(images, torch.ones_like(present)), atol=1e-4)
    swapped = scene.image(images.flip(1), present)  # only which views there are matters, not their order
    assert torch.allclose(scene.image(images, present), swapped, atol=1e-6)


def test_a_word_never_seen_shares_the_pieces_that_were():
    vocabulary = Vocabulary.fit(["open the drawer"])
    (seen,), (alike,), (strange,) = (vocabulary.rows(w) for w in ("drawer", "drawers", "xyz"))
    assert set(alike) < set(seen)
    assert strange.tolist() == [0]
    assert [len(r) for r in vocabulary.rows("The, OPEN drawer!")] == [
        len(r) for r in vocabulary.rows("the open drawer")
    ]
    with pytest.raises(DataError, match=r"'\?!' has no words"):
        vocabulary.rows("?!")


def test_loss_of_pairs_is_clips_and_repeated_texts_are_one():
    rng = torch.Generator().manual_seed(2)
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 11, generator=rng), dim=-1) for n in (5, 5))
    scale = torch.tensor(7.0)
    logits = 7 * images @ texts.T
    pairs = torch.arange(5)
    clip = (torch.nn.functional.cross_entropy(logits, pairs) + torch.nn.functional.cross_entropy(logits.T, pairs)) / 2
    assert torch.allclose(contrastive_loss(images, texts, pairs, scale), clip)
    # An image that says the same as another is no negative: at perfect agreement the loss reaches its floor.
    perfect = torch.eye(3)[[0, 0, 1, 2]]
    floor = contrastive_loss(perfect, torch.eye(3), torch.tensor([0, 0, 1, 2]), torch.tensor(50.0))
    assert float(floor) == pytest.approx(np.log(2) / 3 / 2, abs=1e-6)  # the text of two images is divided between them


def test_retrieval_counts_what_it_says():
    frames = Frames(
        pixels=np.zeros((1, 2, 2, 3), np.uint8),
        image_of=np.zeros((7, 1), np.int64),
        text=np.array([0, 0, 1, 2, 0, 1, 2]),
        task=np.array([0, 0, 0, 1, 0, 0, 1]),
        held_out=np.array([0, 0, 0, 0, 1, 1, 1], bool),
    )
    similarity = np.array([[0.9, 0.1, 0.2], [0.5, 0.4, 0.1], [0.3, 0.9, 0.2]], np.float32)
    found = _retrieval(similarity, frames, np.array([4, 5, 6]))
    assert (found.recall_1, found.recall_5, found.chance_1, found.chance_5) == (1 / 3, 1.0, 1 / 3, 1.0)
    assert found.task == pytest.approx(2 / 3)  # the third takes a text of the other task
    assert found.task_chance == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert (found.phase, found.phase_usual) == (
        0.5,
        0.5,
    )  # of the first task's two, the first is right, and the usual one


def test_resize_keeps_what_fits_and_averages_what_does_not():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    assert resize(images, 16) is images
    flat = np.full((2, 23, 37, 3), 91, np.uint8)
    assert (resize(flat, 16) == 91).all()
    assert abs(resize(images, 4).mean() - images.mean()) < 3


# -- on disk ------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path):
    scene, rng = model(), np.random.default_rng(1)
    save_scene(scene, tmp_path / "a", {"note": 1})
    again, identity = load_scene(tmp_path / "a")
    images = torch.from_numpy(rng.integers(0, 256, (5, 2, 16, 16, 3), dtype=np.uint8))
    present, words = torch.ones(5, 2, dtype=torch.bool), [scene.vocabulary.rows("open the red square")]
    assert torch.equal(again.image(images, present), scene.image(images, present))
    assert torch.equal(again.text(words), scene.text(words))
    save_scene(scene, tmp_path / "b", {"note": 2})
    assert load_scene(tmp_path / "b")[1] == identity  # facts about the training change no feature
    save_scene(model(1), tmp_path / "c", {})
    assert load_scene(tmp_path / "c")[1] != identity


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors"])
def test_damaged_folders_are_refused(tmp_path, name):
    folder = save_scene(model(), tmp_path / "a", {})
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="copy the"):
        load_scene(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match="no complete teacher"):
        load_scene(folder)


# -- the verb -----------------------------------------------------------------------------------------------------


def test_the_verb_trains_a_teacher_that_loads_and_tells_what_it_is_worth(tmp_path, capsys):
    np.savez(tmp_path / "one.npz", **squares(5, 7))
    np.savez(tmp_path / "two.npz", **squares(7, 5))
    files = [str(tmp_path / name) for name in ("one.npz", "two.npz")]
    small = ["--steps", "2", "--batch-size", "5", "--size", "16", "--seed", "3", "--views", "image"]
    assert main(["teacher", "--data", *files, "--out", str(tmp_path / "t"), *small]) == 0
    said = capsys.readouterr().out
    assert "trained on 46 images of 46 frames of 8 episodes with 6 texts" in said
    assert "24 held-out images among 6 texts: R@1" in said
    assert f"--teacher {tmp_path / 't'}" in said
    assert load_teacher(tmp_path / "t").encode(["push the red square"]).shape == (1, 128)
    assert main(["teacher", "--data", *files, "--out", str(tmp_path / "t"), *small]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_one_episode_teaches_and_nothing_is_claimed(tmp_path):
    with pytest.warns(UserWarning, match="too few"):
        report = train_teacher(world(1, 13), tmp_path / "t", training=TINY, config=SMALL, device="cpu", progress=False)
    assert report.held_out is None
    assert json.loads((report.folder / "config.json").read_text())["training"]["held_out"] is None


def test_of_more_images_than_fit_every_so_manyth_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("actok.training.teacher_frames.MOST_BYTES", 47 * 3 * 16 * 16)
    report = train_teacher(world(5, 17), tmp_path / "t", training=TINY, config=SMALL, device="cpu", progress=False)
    assert report.stride == 2
    assert report.frames + report.held_out.frames == 5 * 9


@needs_real
def test_simulated_images_come_with_instruction_and_phase():
    assembly = open_dataset(REAL / "sim" / "metaworld_img64" / "assembly-v3.npz")
    lift = open_dataset(REAL / "sim" / "robosuite_img64" / "Lift_UR5e.npz")
    frames, texts, facts = read_frames([assembly, lift], 16, 0, None, False)
    nut = "pick up the nut and place it onto the peg"
    assert {f"{nut}, phase {k} of 5" for k in range(1, 6)} < set(texts)
    assert "lift the red cube. Current step: grasp." in texts
    assert len(frames.text) == len(frames.pixels) == 463 + 254
    assert facts["episodes"] == 3 + 3
    assert not frames.held_out[:92].any() or frames.held_out[:92].all()  # an episode is held out whole


# -- errors -------------------------------------------------------------------------------------------------------


def test_data_that_cannot_teach_are_refused(tmp_path):
    arrays = {"action": np.zeros((10, 3), np.float32), "episode_length": [5, 5], "control_hz": 20.0}
    pictures = {"image": np.zeros((10, 16, 16, 3), np.uint8)}

    def refused(data, words, **options):
        with pytest.raises((DataError, ConfigError), match=words), pytest.warns(UserWarning, match="too few"):
            train_teacher(data, tmp_path / "t", training=TINY, config=SMALL, progress=False, **options)

    with pytest.raises(DataError, match=r"'mute' has no images.*--images"):
        train_teacher(from_arrays({**arrays, "instruction": "go"}, name="mute"), tmp_path / "t", config=SMALL)
    refused(from_arrays({**arrays, **pictures}, name="x"), "without instruction")
    refused(
        from_arrays({**arrays, **pictures, "instruction": "go"}, name="x"), "all training frames have the text 'go'"
    )
    with pytest.raises(DataError, match="no view 'wrist'; it has image"):
        train_teacher(world(5, 7), tmp_path / "t", config=SMALL, views=["wrist"])
    with pytest.raises(ConfigError, match="4 views"):
        train_teacher(world(5, 7), tmp_path / "t", config=SMALL, views=list("abcd"))
    assert not (tmp_path / "t").exists()


def test_a_loss_that_is_not_finite_saves_nothing(tmp_path):
    wild = replace(TINY, steps=12, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"the loss of the teacher became .* below 1e"):
        train_teacher(world(5, 7), tmp_path / "t", training=wild, config=SMALL, device="cpu", progress=False)
    assert not (tmp_path / "t").exists()


def test_a_folder_in_use_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        train_teacher("no/such/data", tmp_path)


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        (SceneConfig, {"image_size": 40}, "image_size is 40; give a multiple of 16"),
        (SceneConfig, {"channels": ()}, "channels is empty"),
        (SceneConfig, {"channels": (8, 0)}, "channels is 0"),
        (SceneConfig, {"text_width": 20}, "text_width is 20; give a multiple of 8"),
        (SceneConfig, {"dim": 0}, "dim is 0"),
        (TeacherTraining, {"steps": 0}, "steps is 0"),
        (TeacherTraining, {"batch_size": 1}, "batch_size is 1"),
        (TeacherTraining, {"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_impossible_settings_are_refused(kind, wrong, words):
    with pytest.raises(ConfigError, match=words):
        kind(**wrong)
