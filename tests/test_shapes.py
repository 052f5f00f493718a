"""Shapes in signatures are checked under test, and nowhere else."""

import subprocess
import sys

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from actok.data.chunks import ChunkBatch
from actok.signal.bspline import control_points, curve
from actok.signal.normalise import Normaliser
from actok.tokenizers.base import fill_padding

B, T, D = 5, 11, 3
CHUNKS = np.random.default_rng(0).normal(size=(B, T, D))
PADDED = np.zeros((B, T), bool)
MOVES = np.zeros(D, bool)


def batch(**changes) -> ChunkBatch:
    arrays = {
        "actions": CHUNKS.astype(np.float32),
        "pad_mask": PADDED,
        "anchor": None,
        "episode": np.zeros(B, np.int64),
        "start": np.arange(B),
    }
    return ChunkBatch(**{**arrays, **changes})


def test_what_fits_passes():
    assert control_points(CHUNKS, 7, 3, CHUNKS[:, 0]).shape == (B, 7, D)
    assert fill_padding(CHUNKS, PADDED, MOVES).shape == CHUNKS.shape
    assert len(batch()) == B


@pytest.mark.parametrize(
    "call",
    [
        lambda: control_points(CHUNKS, 7, 3, CHUNKS[:, 0].T),
        lambda: fill_padding(CHUNKS.swapaxes(1, 2), PADDED, MOVES),
        lambda: fill_padding(CHUNKS, PADDED.T, MOVES),
        lambda: batch(pad_mask=PADDED.T),
    ],
    ids=["start [D, B]", "chunks [B, D, T]", "mask [T, B]", "a field of a frozen dataclass"],
)
def test_swapped_axes_are_refused(call):
    with pytest.raises(TypeCheckError):
        call()


@pytest.mark.parametrize(
    "call",
    [lambda: curve(CHUNKS[0], 13, 3), lambda: fill_padding(CHUNKS, PADDED[0], MOVES), lambda: batch(start=PADDED)],
    ids=["a chunk for a batch", "one mask for a batch", "a field of a frozen dataclass"],
)
def test_a_wrong_rank_is_refused(call):
    with pytest.raises(TypeCheckError):
        call()


def test_a_wrong_kind_of_number_is_refused():
    with pytest.raises(TypeCheckError):
        curve(np.zeros((B, 7, D), np.int64), 13, 3)


def test_a_result_of_a_wrong_shape_is_refused():
    """Broadcasting against another D would go unnoticed; the result says that it stays."""
    with pytest.raises(TypeCheckError, match="return value"):
        Normaliser.identity(D)(np.zeros((B, T, 1)))


def test_outside_of_tests_nothing_is_checked():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, numpy as np\n"
            "from actok.signal.bspline import control_points, curve\n"
            "from actok.signal.normalise import Normaliser\n"
            "assert not any(hasattr(f, '__wrapped__') for f in (control_points, curve, Normaliser.__call__))\n"
            "assert not any('jaxtyping' in type(f).__module__ for f in sys.meta_path)\n"
            "assert not {'beartype', 'torch', 'jax'} & set(sys.modules)\n"
            "assert Normaliser.identity(3)(np.zeros((5, 11, 1))).shape == (5, 11, 3)\n",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
