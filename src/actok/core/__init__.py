"""Types, shape letters, the abstract classes, layouts, registry and artifact format. Everything rests on this."""

from actok.core.arrays import as_float_batch, as_ids, is_torch, like, to_numpy
from actok.core.artifact import Artifact, check_folder, read_artifact, write_folder
from actok.core.codec import CodecBatch, CodecOutput
from actok.core.config import build_config, merge_settings, parse_assignments
from actok.core.constraint import Constraint, FixedLengthConstraint
from actok.core.errors import (
    ActokError,
    ArtifactError,
    ConfigError,
    DataError,
    MissingExtraError,
    SpaceMismatchError,
    TokenError,
)
from actok.core.layout import TokenLayout
from actok.core.registry import Preset, find_class, find_preset, list_tokenizers, split_settings, tokenizer_presets
from actok.core.spaces import ActionGroup, ActionSpace
from actok.core.tokenizer import ActionTokenizer
from actok.core.types import ChunkContext, Decoded, FitPart, Tokens

__all__ = [
    "ActionGroup",
    "ActionSpace",
    "ActionTokenizer",
    "ActokError",
    "Artifact",
    "ArtifactError",
    "ChunkContext",
    "CodecBatch",
    "CodecOutput",
    "ConfigError",
    "Constraint",
    "DataError",
    "Decoded",
    "FitPart",
    "FixedLengthConstraint",
    "MissingExtraError",
    "Preset",
    "SpaceMismatchError",
    "TokenError",
    "TokenLayout",
    "Tokens",
    "as_float_batch",
    "as_ids",
    "build_config",
    "check_folder",
    "find_class",
    "find_preset",
    "is_torch",
    "like",
    "list_tokenizers",
    "merge_settings",
    "parse_assignments",
    "read_artifact",
    "split_settings",
    "to_numpy",
    "tokenizer_presets",
    "write_folder",
]
