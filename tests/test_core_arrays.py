"""The border between callers' arrays and the library's: dtypes, shapes, non-finite values, ids."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actok.core import DataError, MissingExtraError, TokenError, as_float_batch, as_ids, like, to_numpy


def test_single_chunk_becomes_a_batch_of_one():
    chunk = np.ones((5, 3), np.float64)
    assert as_float_batch(chunk).shape == (1, 5, 3)
    assert as_float_batch(chunk).dtype == np.float32


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_named_with_their_place(value):
    chunks = np.zeros((7, 5, 3), np.float32)
    chunks[4, 2, 1] = value
    with pytest.raises(DataError, match="chunk 4, step 2, dimension 1"):
        as_float_batch(chunks)


def test_large_finite_values_pass():
    chunks = np.full((2, 3, 5), np.finfo(np.float32).max, np.float32)
    assert np.isfinite(as_float_batch(chunks)).all()


@pytest.mark.parametrize("dtype", [np.int64, bool, object, complex])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(DataError, match="dtype"):
        as_float_batch(np.zeros((2, 3, 5), dtype))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 5, 7), (0, 3, 5), (2, 0, 5)])
def test_wrong_or_empty_shapes_are_refused(shape):
    with pytest.raises(DataError, match="shape"):
        as_float_batch(np.zeros(shape, np.float32))


@given(st.lists(st.lists(st.integers(0, 2047), max_size=7), max_size=5))
def test_ids_of_any_lengths_come_back(sequences):
    if sequences and all(len(s) == 0 for s in sequences):
        sequences = [[1], *sequences]
    flat, offsets = as_ids(sequences)
    assert [flat[a:b].tolist() for a, b in itertools.pairwise(offsets)] == sequences


def test_ids_as_matrix_single_sequence_and_list_agree():
    matrix = np.arange(15).reshape(5, 3)
    assert as_ids(matrix)[0].tolist() == as_ids([*matrix])[0].tolist() == list(range(15))
    assert as_ids(matrix[0])[1].tolist() == as_ids([0, 1, 2])[1].tolist() == [0, 3]


@pytest.mark.parametrize("ids", [np.zeros((2, 3)), [[0.5]], "text", np.zeros((2, 3, 5), int), [["a"]]])
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(TokenError):
        as_ids(ids)


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    x = torch.linspace(-1, 1, 30, dtype=torch.bfloat16).reshape(2, 3, 5)
    assert as_float_batch(x).shape == (2, 3, 5)
    back = like(to_numpy(x), x)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, x)
    assert like(np.arange(3), x).dtype == torch.int64


def test_a_missing_extra_names_its_remedy_across_processes():
    error = pickle.loads(pickle.dumps(MissingExtraError("metaworld", "metaworld", "this simulator")))
    assert isinstance(error, ImportError)
    assert str(error) == "this simulator needs metaworld; install it with: pip install 'actok[metaworld]'"
