"""The published file format of FAST and FAST+ (Hub id physical-intelligence/fast): reading and writing its folders.

    tokenizer.json          the BPE, of the tokenizers library
    processor_config.json   scale, min_token, and, where they are fixed, time_horizon (T) and action_dim (D)

The published processor encodes c = round(scale * DCT(x)) as the characters chr(c - min_token) (below 0: chr(0), without
a word), and decodes by ord(character) + min_token. The files are read as they are, without transformers and without the
folder's Python code; ids are the same.

The files say nothing of the largest value they are meant for. FAST+ has min_token = -354 at scale 10, which is a signal
of T = 50 steps held at -5 (10 * sqrt(50) * 5 = 353.6), hence RANGE_LIMIT = 5 where a caller gives none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from actok.core import ArtifactError

PROCESSOR_FILE = "processor_config.json"
TOKENIZER_FILE = "tokenizer.json"
RANGE_LIMIT = 5.0
PROCESSOR_CLASS = "UniversalActionProcessor"
# Where loaders of transformers find the class that reads these files.
PROCESSOR_CODE = "physical-intelligence/fast--processing_action_tokenizer.UniversalActionProcessor"

__all__ = ["PROCESSOR_FILE", "RANGE_LIMIT", "TOKENIZER_FILE", "Published", "is_published_folder", "publish", "read"]


class Published(NamedTuple):
    """What a published folder holds."""

    source: bytes  # tokenizer.json
    scale: float
    min_token: int
    horizon: int | None
    dim: int | None


def is_published_folder(folder_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> bool:
    """True for a folder or Hub id that holds a published FAST tokenizer rather than an artifact of this library."""
    path, name = Path(folder_or_hub_id), os.fspath(folder_or_hub_id)
    if path.exists() or not _is_hub_id(name):
        return (path / PROCESSOR_FILE).is_file() and (path / TOKENIZER_FILE).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, PROCESSOR_FILE, revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return False  # whoever reads it as an artifact says what is wrong
    return True


def read(folder_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Published:
    """Read a folder or Hub id. Raises ArtifactError naming the file that is missing or what is wrong in it."""
    folder = Path(folder_or_hub_id)
    if not folder.exists():
        folder = _download(os.fspath(folder_or_hub_id), revision)
    for name in (PROCESSOR_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} has no {name}; give a folder in the published FAST format")
    path = folder / PROCESSOR_FILE
    try:
        settings = json.loads(path.read_bytes())
        scale, min_token = float(settings["scale"]), settings["min_token"]
        horizon, dim = settings.get("time_horizon"), settings.get("action_dim")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is not a FAST processor config ({error!r}); it has scale and min_token") from None
    if not isinstance(min_token, int) or not 0 < scale < float("inf"):
        raise ArtifactError(f"{path} has scale {scale} and min_token {min_token!r}; a positive and a whole number")
    return Published((folder / TOKENIZER_FILE).read_bytes(), scale, min_token, horizon, dim)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _download(name: str, revision: str | None) -> Path:
    if not _is_hub_id(name):
        raise ArtifactError(
            f"{name} does not exist; give a folder in the published FAST format, or a Hub id 'user/name'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"{name} is neither a local folder nor reachable on the Hub ({type(error).__name__}); check the name"
        ) from error


def publish(
    *, source: bytes, scale: float, min_token: int, vocab: int, horizon: int | None, dim: int | None
) -> Mapping[str, bytes]:
    """The files of a published folder."""
    reference = {"auto_map": {"AutoProcessor": PROCESSOR_CODE}, "processor_class": PROCESSOR_CLASS}
    processor: dict[str, Any] = {
        "action_dim": dim,
        **reference,
        "min_token": min_token,
        "scale": int(scale) if float(scale).is_integer() else scale,
        "time_horizon": horizon,
        "vocab_size": vocab,
    }
    tokenizer = {
        **reference,
        "added_tokens_decoder": {},
        "clean_up_tokenization_spaces": False,  # with True, transformers would drop spaces, that is coefficients
        "model_max_length": int(1e30),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    texts = {PROCESSOR_FILE: processor, "tokenizer_config.json": tokenizer, "special_tokens_map.json": {}}
    return {TOKENIZER_FILE: source, **{name: (json.dumps(v, indent=2) + "\n").encode() for name, v in texts.items()}}


def tensors_of(published: Published, range_limit: float | None) -> dict[str, np.ndarray]:
    """What FastTokenizer keeps beside the BPE."""
    return {
        "min_token": np.array([published.min_token], np.int64),
        "range_limit": np.array([RANGE_LIMIT if range_limit is None else range_limit], np.float64),
    }
