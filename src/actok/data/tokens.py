"""Token files: encoded chunks in parquet, carrying the hash of the tokenizer that made them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actok.core import DataError
from actok.core.files import atomic_path

FORMAT = "actok.tokens/1"

__all__ = ["TokenTable", "read_tokens", "write_npz", "write_tokens"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """B encoded chunks.

    Attributes:
        ids: flat int64; sequence b is ids[offsets[b]:offsets[b + 1]].
        offsets: [B + 1].
        episode, start: [B] where each chunk was cut: episode of the dataset, first step within it.
        real_steps: [B] steps that are not padding.
        out_of_range, saturated: [B] counts reported by `encode`.
        anchor: float32 [B, P] proprioception at the chunk starts, for tokenizers that decode from the state; or None.
        tokenizer_hash: `weights_hash` of the tokenizer.
        horizon, embodiment, dataset: what `decode` and a reader need.
    """

    ids: np.ndarray
    offsets: np.ndarray
    episode: np.ndarray
    start: np.ndarray
    real_steps: np.ndarray
    out_of_range: np.ndarray
    saturated: np.ndarray
    tokenizer_hash: str
    horizon: int
    embodiment: str
    dataset: str
    anchor: np.ndarray | None = None


_COLUMNS = ("episode", "start", "real_steps", "out_of_range", "saturated")


def write_tokens(table: TokenTable, path: str | Path) -> Path:
    """Write a parquet file, atomically: one row a chunk, columns ids (list), episode, start, real_steps, counts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    ids = pa.LargeListArray.from_arrays(pa.array(table.offsets, pa.int64()), pa.array(table.ids, pa.int32()))
    facts: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer_hash": table.tokenizer_hash,
        "horizon": table.horizon,
        "embodiment": table.embodiment,
        "dataset": table.dataset,
    }
    columns: dict[str, Any] = {name: pa.array(getattr(table, name), pa.int64()) for name in _COLUMNS}
    if table.anchor is not None:
        values = pa.array(np.ascontiguousarray(table.anchor, np.float32).reshape(-1))
        columns["anchor"] = pa.FixedSizeListArray.from_arrays(values, table.anchor.shape[1])
    arrow = pa.table({**columns, "ids": ids}).replace_schema_metadata({"actok": json.dumps(facts)})
    with atomic_path(path) as temporary:
        pq.write_table(arrow, temporary, compression="zstd")
    return path


def read_tokens(path: str | Path) -> TokenTable:
    """Read what `write_tokens` wrote. Raises DataError where the file is missing, corrupt or of another kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        arrow = pq.read_table(path)
        facts = json.loads((arrow.schema.metadata or {})[b"actok"])
    except FileNotFoundError:
        raise DataError(f"token file {path} does not exist; write one with: actok encode") from None
    except KeyError:
        raise DataError(f"{path} is parquet but no token file of actok; write one with: actok encode") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"token file {path} cannot be read ({error}); encode the data again") from None
    if facts.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {facts.get('format')!r}, this actok reads {FORMAT!r}; encode the data again"
        )
    wanted = {"tokenizer_hash", "horizon", "embodiment", "dataset", "ids", *_COLUMNS}
    if missing := sorted(wanted - {*facts, *arrow.column_names}):
        raise DataError(f"token file {path} lacks {missing[0]!r}; encode the data again")
    ids = arrow["ids"].combine_chunks()
    offsets = ids.offsets.to_numpy().astype(np.int64)
    columns = {name: arrow[name].to_numpy() for name in _COLUMNS}
    anchor = None
    if "anchor" in arrow.column_names:
        values = arrow["anchor"].combine_chunks()
        anchor = values.values.to_numpy().reshape(len(values), -1)
    return TokenTable(
        ids=ids.values.to_numpy().astype(np.int64),
        offsets=offsets,
        tokenizer_hash=facts["tokenizer_hash"],
        horizon=facts["horizon"],
        embodiment=facts["embodiment"],
        dataset=facts["dataset"],
        anchor=anchor,
        **columns,
    )


def write_npz(path: str | Path, **arrays: np.ndarray) -> Path:
    """Write named arrays to a compressed npz file, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return Path(path)
