"""actok: action tokenizers for vision-language-action models, trainable behind one API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use, so that `import actok` stays free of NumPy, SciPy, torch and everything else.
_LAZY = {
    "fit": "actok.training",
    "load": "actok.training",
    "load_policy": "actok.policies.load",
    "train_policy": "actok.training.policy",
    "list_tokenizers": "actok.core",
    "ActionSpace": "actok.core",
    "ActionTokenizer": "actok.core",
    "ActokError": "actok.core",
    "ChunkContext": "actok.core",
    "Decoded": "actok.core",
    "TokenLayout": "actok.core",
    "Tokens": "actok.core",
}

if TYPE_CHECKING:
    from actok.core import (
        ActionSpace,
        ActionTokenizer,
        ActokError,
        ChunkContext,
        Decoded,
        TokenLayout,
        Tokens,
        list_tokenizers,
    )
    from actok.policies.load import load_policy
    from actok.training import fit, load
    from actok.training.policy import train_policy

__all__ = [
    "ActionSpace",
    "ActionTokenizer",
    "ActokError",
    "ChunkContext",
    "Decoded",
    "TokenLayout",
    "Tokens",
    "__version__",
    "fit",
    "list_tokenizers",
    "load",
    "load_policy",
    "train_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'actok' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
