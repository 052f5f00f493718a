"""Template of the tokenizers that need no gradient: `fit_codec` turns normalised chunks into tensors and files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from actok.core import FitPart
from actok.tokenizers.base import CodecInput, TokenizerBase, known_parts

__all__ = ["ClosedFormTokenizer"]


class ClosedFormTokenizer(TokenizerBase):
    """A tokenizer that is fitted in closed form. A subclass adds `fit_codec` to what `TokenizerBase` asks for."""

    @classmethod
    @abstractmethod
    def fit_codec(
        cls, inputs: Sequence[CodecInput], config: Any, horizon: int
    ) -> tuple[dict[str, np.ndarray], dict[str, bytes]]:
        """Tensors and files of a codec fitted on normalised chunks."""

    @classmethod
    def fit(cls, parts: Sequence[FitPart], config: Any) -> Self:
        """Fit on chunks of one or more embodiments (the first is the default), all of one horizon T.

        Raises as `known_parts` does; warns about dimensions that are constant in the data.
        """
        inputs, embodiments, horizon = known_parts(parts, config)
        tensors, files = cls.fit_codec(inputs, config, horizon)
        return cls(
            config, embodiments, horizon, tensors, files, {"fitted_on_chunks": sum(len(p.actions) for p in parts)}
        )
