"""Where codes live among a language model's ids. The only place that maps one to the other; as integers, never as text.

Every code and every control token has an index: codes of table 0, of table 1, ..., then the control tokens. An index i
becomes the id `first + i` (new tokens, explicit range) or `first - i` (the vocabulary's tail, as openpi counts for FAST:
id = vocabulary size - 1 - reserved - code). So a map is an affine bijection, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from jaxtyping import Int

from actok.core import ConfigError, TokenError, TokenLayout, build_config, is_torch, like, to_numpy

CONTROLS = ("boblk", "eoblk", "end")
KINDS = ("added", "tail", "range")

__all__ = ["CONTROLS", "CodesFound", "VocabularyMap"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CodesFound:
    """What `VocabularyMap.to_codes` read.

    Attributes:
        codes: int64, shape of the ids; -1 where the id is no code that may stand there.
        is_code: bool, the same shape.
    """

    codes: Any
    is_code: Any


@dataclass(frozen=True, kw_only=True)
class VocabularyMap:
    """A bijection between (table, code) pairs plus control tokens, and language-model ids.

    `VocabularyMap.for_layouts` makes one from the layouts that a policy is to speak.

    Attributes:
        kind: "added": new ids from `model_vocab` on. "tail": the last ids of the model's vocabulary, downwards, above
            which `reserved` ids are left alone. "range": the ids from `start` to before `stop`.
        tables: number of codes of each of `TokenLayout.table`'s tables; 0 where a table is not used.
        model_vocab: ids that the model has without this map (what its text needs, or the rows of its embedding table:
            some models have more rows than ids, and "added" uses these spare rows if `model_vocab` does not count them).
        shared: all tables read the same ids, which are then as many as the largest table has codes.
        reserved: for "tail" (PaliGemma as in openpi: 128, its segmentation tokens).
        start, stop: for "range". A range beyond `model_vocab` makes the embedding table grow.
        existing: control tokens that are ids of the model already, e.g. {"end": eos_id}; the others get ids of their own.
        special: ids of the model that nothing may replace: end, padding, images, ...

    Raises ConfigError naming the value and the remedy.
    """

    kind: str
    tables: tuple[int, ...]
    model_vocab: int
    shared: bool = False
    reserved: int = 0
    start: int | None = None
    stop: int | None = None
    existing: Mapping[str, int] = field(default_factory=dict)
    special: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind is {self.kind!r}; give one of {', '.join(KINDS)}")
        if not isinstance(self.shared, bool):
            raise ConfigError(f"shared is {self.shared!r}; give True or False")
        for name, least in (("model_vocab", 1), ("reserved", 0)):
            if not _whole(getattr(self, name), least):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; give a whole number of at least {least}")
        if not self.tables or not all(_whole(t, 0) for t in self.tables) or not any(self.tables):
            raise ConfigError(f"tables are {self.tables!r}; give the number of codes of each, at least one above 0")
        if (self.kind == "range") != (self.start is not None) or (self.start is None) != (self.stop is None):
            raise ConfigError(
                f"start is {self.start!r}, stop {self.stop!r} and kind {self.kind!r}; give both for kind 'range' only"
            )
        if self.reserved and self.kind != "tail":
            raise ConfigError(f"reserved is {self.reserved} and kind {self.kind!r}; only 'tail' leaves ids above it")
        self._check_controls()
        self._check_room()
        # The caller may go on changing what was given, and equal maps are to compare equal.
        object.__setattr__(self, "existing", dict(sorted(self.existing.items())))
        object.__setattr__(self, "special", tuple(sorted(set(self.special))))

    def _check_controls(self) -> None:
        for name, value in self.existing.items():
            if name not in CONTROLS:
                raise ConfigError(f"existing names {name!r}; the control tokens are {', '.join(CONTROLS)}")
            if not _whole(value, 0) or value >= self.model_vocab:
                raise ConfigError(
                    f"existing gives {name!r} the id {value!r}, the model has ids 0 to {self.model_vocab - 1}; leave the"
                    " name out to get a new id"
                )
        if len(set(self.existing.values())) < len(self.existing):
            raise ConfigError(f"existing is {dict(self.existing)!r}; give every control token an id of its own")
        for value in self.special:
            if not _whole(value, 0):
                raise ConfigError(f"special holds {value!r}; give ids, whole numbers of at least 0")

    def _check_room(self) -> None:
        low, high = self.span
        if self.kind == "tail" and low < 0:
            raise ConfigError(
                f"{self.size} ids and {self.reserved} reserved ones do not fit into the model's {self.model_vocab}; share"
                " the tables' ids, or use kind 'added'"
            )
        if self.kind == "range":
            assert self.start is not None
            assert self.stop is not None
            if not _whole(self.start, 0) or not _whole(self.stop, 1) or self.stop - self.start < self.size:
                raise ConfigError(
                    f"the range from {self.start!r} to before {self.stop!r} is too small for {self.size} ids (codes and"
                    f" control tokens); give at least stop={_or_zero(self.start) + self.size}, or share the tables' ids"
                )
        taken = {
            f"the control token {name!r} has the id {value}, which": value for name, value in self.existing.items()
        }
        taken |= {f"the special id {value}": value for value in self.special}
        taken = {text: value for text, value in taken.items() if low <= value < high}
        if taken:
            text, lowest = min(taken.items(), key=lambda found: found[1])
            remedy = "move the range"
            if self.kind == "tail":
                remedy = f"leave them above it (reserved={self.model_vocab - lowest}), or use kind 'added'"
            elif self.kind == "added":
                remedy = "count them in model_vocab"
            raise ConfigError(
                f"{text} is among the map's ids {low} to {high - 1} ({len(taken)} such ids are); {remedy}"
            )

    @classmethod
    def for_layouts(
        cls, kind: str, layouts: TokenLayout | Sequence[TokenLayout], model_vocab: int, **rest: Any
    ) -> Self:
        """The map for a layout, or for all of several (horizons, embodiments): tables as large as any of them needs."""
        layouts = [layouts] if isinstance(layouts, TokenLayout) else list(layouts)
        if not layouts:
            raise ConfigError("no layout was given; give tokenizer.layout, or several of layout_for")
        tables = np.zeros(max(int(layout.table.max()) for layout in layouts) + 1, np.int64)
        for layout in layouts:
            np.maximum.at(tables, layout.table, layout.vocab)
        return cls(kind=kind, tables=tuple(tables.tolist()), model_vocab=model_vocab, **rest)

    # -- what it occupies -----------------------------------------------------------------------------------------

    @cached_property
    def _offsets(self) -> Int[np.ndarray, "tables"]:
        """Index of code 0 of each table."""
        return np.zeros(len(self.tables), np.int64) if self.shared else np.cumsum([0, *self.tables[:-1]])

    @property
    def codes(self) -> int:
        """How many ids stand for codes."""
        return max(self.tables) if self.shared else sum(self.tables)

    @property
    def size(self) -> int:
        """How many ids the map occupies: codes and the control tokens that the model does not have already."""
        return self.codes + len(CONTROLS) - len(self.existing)

    @property
    def span(self) -> tuple[int, int]:
        """Lowest id that the map occupies, and the one after the highest."""
        if self.kind == "tail":
            return self.model_vocab - self.reserved - self.size, self.model_vocab - self.reserved
        low = self.model_vocab if self.kind == "added" else _or_zero(self.start)
        return low, low + self.size

    @property
    def embeddings(self) -> int:
        """Rows that the model's embedding table must have; never shrink a table that has more."""
        return max(self.model_vocab, self.span[1])

    @property
    def boblk(self) -> int:
        """Id of <BoBlk>: blocks begin."""
        return self._control("boblk")

    @property
    def eoblk(self) -> int:
        """Id of <EoBlk>: blocks end, text goes on."""
        return self._control("eoblk")

    @property
    def end(self) -> int:
        """Id that ends a sequence of varying length."""
        return self._control("end")

    def _control(self, name: str) -> int:
        if name in self.existing:
            return self.existing[name]
        return self._id(self.codes + [c for c in CONTROLS if c not in self.existing].index(name))

    def _id(self, index: Any) -> Any:
        """Id of an index; `_index` is its inverse."""
        low, high = self.span
        return high - 1 - index if self.kind == "tail" else low + index

    def _index(self, ids: Any) -> Any:
        low, high = self.span
        return high - 1 - ids if self.kind == "tail" else ids - low

    def ids_of(self, table: int) -> Int[np.ndarray, "codes"]:
        """The ids of codes 0, 1, 2, ... of one table."""
        if not 0 <= table < len(self.tables):
            raise ConfigError(f"table {table} is not among the map's {len(self.tables)}; make it for this layout")
        return self._id(self._offsets[table] + np.arange(self.tables[table]))

    def rows_of(self, table: int) -> slice:
        """The same ids as a range, from the lowest to the highest."""
        ids = self.ids_of(table)
        return slice(int(ids.min()), int(ids.max()) + 1)

    # -- there and back -------------------------------------------------------------------------------------------

    def to_lm(self, codes: Any, layout: TokenLayout, positions: Any = None) -> Any:
        """Language-model ids of codes.

        Args:
            codes: integers [..., n], NumPy or torch; the result is of the same kind, int64, on the same device.
            layout: what the codes belong to.
            positions: where in the sequence each code stands, broadcast against codes; None: 0, 1, ..., n - 1.

        Raises TokenError for a code that may not stand where it stands, ConfigError for a layout of other tables.
        """
        codes = _integers(codes, "codes")
        vocab, offsets = self._at(codes, layout, positions)
        bad = (codes < 0) | (codes >= vocab)
        if bool(bad.any()):
            value, largest = int(codes[bad].reshape(-1)[0]), int((vocab + 0 * codes)[bad].reshape(-1)[0]) - 1
            raise TokenError(
                f"code {value} stands where codes go from 0 to {largest} ({int(bad.sum())} such codes in all); map"
                " codes of this layout only, and no padding"
            )
        return self._id(codes + offsets)

    def to_codes(self, ids: Any, layout: TokenLayout, positions: Any = None) -> CodesFound:
        """Codes of language-model ids, and where there are any: text, control tokens and codes of other tables are found.

        Arguments and errors are those of `to_lm`; an id that is no code is no error.
        """
        ids = _integers(ids, "ids")
        vocab, offsets = self._at(ids, layout, positions)
        codes = self._index(ids) - offsets
        is_code = (codes >= 0) & (codes < vocab)
        codes = codes.where(is_code, -1) if is_torch(codes) else np.where(is_code, codes, -1)
        return CodesFound(codes=codes, is_code=is_code)

    def _at(self, given: Any, layout: TokenLayout, positions: Any) -> tuple[Any, Any]:
        """(number of codes, index of code 0) at each position, of the same kind and on the same device as `given`."""
        sizes = np.zeros(max(int(layout.table.max()) + 1, len(self.tables)), np.int64)
        sizes[: len(self.tables)] = self.tables
        short = layout.vocab > (max(self.tables) if self.shared else sizes[layout.table])
        if short.any():
            p = int(np.argmax(short))
            raise ConfigError(
                f"position {p} of the layout takes {layout.vocab[p]} codes of table {layout.table[p]}, the map has tables"
                f" of {list(self.tables)}; make the map for this layout too"
            )
        places = np.arange(given.shape[-1]) if positions is None else to_numpy(_integers(positions, "positions"))
        if places.size and (places.min() < 0 or places.max() >= layout.max_len):
            raise TokenError(
                f"positions go from {places.min()} to {places.max()}, sequences of this layout have at most"
                f" {layout.max_len} tokens; cut off what follows the end"
            )
        table = layout.table[places]
        offsets = np.zeros_like(table) if self.shared else self._offsets[table]
        return like(layout.vocab[places], given), like(offsets, given)

    # -- keeping it -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        return {**values, "tables": list(self.tables), "special": list(self.special)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, also after JSON. Raises ConfigError for an unknown key or a value that cannot be."""
        return build_config(cls, values, "a vocabulary map")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _or_zero(value: Any) -> int:
    return value if _whole(value, 0) else 0


def _integers(values: Any, name: str) -> Any:
    """int64, NumPy or torch. Raises TokenError for another dtype."""
    if is_torch(values):
        if values.is_floating_point() or values.is_complex() or str(values.dtype) == "torch.bool":
            raise TokenError(f"{name} have dtype {values.dtype}; give integers")
        values = values.long()
    else:
        values = np.asarray(values)
        if values.dtype.kind not in "iu":
            raise TokenError(f"{name} have dtype {values.dtype}; give integers")
        values = values.astype(np.int64)
    if not values.ndim:
        raise TokenError(f"{name} are the single number {int(values)}; give a sequence [n] or a batch [B, n]")
    return values
