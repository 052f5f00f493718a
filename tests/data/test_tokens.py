"""Token files: what is written is read back; damaged and foreign files are refused by name."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from actok.core import DataError
from actok.data import TokenTable, read_tokens, write_tokens

LENGTHS = np.array([3, 0, 5])


@pytest.fixture
def table() -> TokenTable:
    rng = np.random.default_rng(0)
    counts = {k: rng.integers(0, 7, 3) for k in ("episode", "start", "real_steps", "out_of_range", "saturated")}
    return TokenTable(
        ids=rng.integers(0, 11, LENGTHS.sum()),
        offsets=np.concatenate([[0], np.cumsum(LENGTHS)]),
        tokenizer_hash="ab",
        horizon=13,
        embodiment="arm",
        dataset="set",
        anchor=rng.normal(size=(3, 2)).astype(np.float32),
        **counts,
    )


def test_round_trip(tmp_path, table):
    found = read_tokens(write_tokens(table, tmp_path / "t.parquet"))
    for name, value in vars(table).items():
        np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


@pytest.mark.parametrize("column", ["ids", "real_steps"])
def test_a_missing_column_is_named(tmp_path, table, column):
    path = write_tokens(table, tmp_path / "t.parquet")
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    with pytest.raises(DataError, match=rf"t\.parquet lacks '{column}'; encode the data again"):
        read_tokens(path)


def test_damaged_and_foreign_files(tmp_path, table):
    path = write_tokens(table, tmp_path / "t.parquet")
    stored = pq.read_table(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_tokens(path)
    pq.write_table(stored.replace_schema_metadata({}), path)
    with pytest.raises(DataError, match="no token file of actok"):
        read_tokens(path)
    with pytest.raises(DataError, match="does not exist"):
        read_tokens(tmp_path / "none.parquet")
