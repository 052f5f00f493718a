"""The contract of every action tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from actok.core.artifact import Artifact, push_artifact, read_artifact, write_artifact
from actok.core.constraint import Constraint
from actok.core.errors import ArtifactError, SpaceMismatchError
from actok.core.layout import TokenLayout
from actok.core.spaces import ActionSpace
from actok.core.types import ChunkContext, Decoded, Tokens

__all__ = ["ActionTokenizer"]


class ActionTokenizer(ABC):
    """A fitted, immutable map between chunks of continuous actions [B, T, D] and token ids, and back.

    Class attributes:
        kind: name in artifacts, e.g. "fast"; the registry finds the class by it.
        config_class: frozen, keyword-only dataclass that validates itself.
        learned: False: the class has `fit(parts, config)`, which gives a fitted tokenizer in closed form. True: it has
            `prepare(parts, config, seed=...)`, which gives an untrained one that `actok.training` trains.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type]
    learned: ClassVar[bool] = False

    # -- making one -----------------------------------------------------------------------------------------------

    @abstractmethod
    def adapt(self, space: ActionSpace, statistics: Any) -> Self:
        """The same weights (same `weights_hash`) with one more embodiment's normaliser, made from `statistics`."""

    # -- using it -------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, actions: Any, context: ChunkContext | None = None) -> Tokens:
        """Tokens of chunks [B, T, D] in raw units (NumPy or torch; [T, D] is a batch of one).

        Raises DataError for non-finite values or a wrong dtype, SpaceMismatchError for a wrong D or an unknown
        embodiment.
        """

    @abstractmethod
    def decode(
        self, ids: Any, context: ChunkContext | None = None, *, horizon: int | None = None, repair: str | None = None
    ) -> Decoded:
        """Chunks [B, T, D] in raw units from token ids (list of sequences, [B, N], one sequence, or Tokens).

        `horizon` wins over `context.horizon`, that over the horizon of a `Tokens` argument, that over the fitted one.
        Raises TokenError for ids outside the vocabulary. A sequence that does not decode gives NaN and valid=False,
        unless a `repair` mode that the tokenizer names is asked for.
        """

    @abstractmethod
    def layout_for(self, horizon: int | None = None, embodiment: str | None = None) -> TokenLayout:
        """The structure of sequences at another horizon or for another embodiment."""

    @abstractmethod
    def constraint(self, context: ChunkContext | None = None) -> Constraint:
        """The automaton of decodable sequences for that context's horizon and embodiment."""

    @abstractmethod
    def normalise(self, actions: Any, context: ChunkContext | None = None) -> Any:
        """Raw units -> the normalised units that the codec works in."""

    @abstractmethod
    def denormalise(self, actions: Any, context: ChunkContext | None = None) -> Any:
        """The inverse of `normalise`."""

    # -- what it is -----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def horizon(self) -> int:
        """T it was fitted at."""

    @property
    @abstractmethod
    def spaces(self) -> Mapping[str, ActionSpace]:
        """Action space by embodiment; the first is the default."""

    def embodiment_for(self, space: ActionSpace) -> str:
        """The embodiment whose action space is that of some data: the one of the same name, else the first that agrees.

        Raises SpaceMismatchError naming the differences.
        """
        known = self.spaces
        if not known:
            raise SpaceMismatchError(
                "this tokenizer has no action space of its own (published FAST files state none); add one with"
                " adapt(space, statistics)"
            )
        candidates = [space.embodiment] if space.embodiment in known else list(known)
        differences = {name: known[name].differences(space) for name in candidates}
        for name, found in differences.items():
            if not found:
                return name
        name, found = min(differences.items(), key=lambda item: len(item[1]))
        raise SpaceMismatchError(
            f"data of action space {space.embodiment!r} do not fit this tokenizer's {name!r}: {'; '.join(found)}; name the"
            " right space, or add the embodiment with adapt(space, statistics)"
        )

    @property
    @abstractmethod
    def meta(self) -> Mapping[str, Any]:
        """Facts for a reader: what it was fitted on, split, tolerance report. Not part of any hash."""

    @abstractmethod
    def with_meta(self, meta: Mapping[str, Any]) -> Self:
        """The same tokenizer with these facts added."""

    @property
    def layout(self) -> TokenLayout:
        """Layout at the fitted horizon for the default embodiment."""
        return self.layout_for()

    @property
    def vocab_size(self) -> int:
        """Largest number of codes that any position may take."""
        return int(self.layout.vocab.max())

    # -- keeping it -----------------------------------------------------------------------------------------------

    @abstractmethod
    def to_artifact(self) -> Artifact:
        """Everything needed to rebuild this tokenizer."""

    @classmethod
    @abstractmethod
    def from_artifact(cls, artifact: Artifact) -> Self:
        """Rebuild from what `to_artifact` gave."""

    @property
    def weights_hash(self) -> str:
        """Hash of config, tensors and files, without the embodiments: equal before and after `adapt`."""
        return self.to_artifact().weights_hash

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write config.json and model.safetensors, atomically: the folder is complete or unchanged."""
        return write_artifact(self.to_artifact(), Path(folder))

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, *, revision: str | None = None) -> Self:
        """Load a folder or Hub id saved by this class. Raises ArtifactError; `actok.load` finds the class by itself."""
        artifact = read_artifact(folder_or_hub_id, revision=revision)
        if artifact.kind != cls.kind:
            raise ArtifactError(
                f"{folder_or_hub_id} holds a {artifact.kind!r} tokenizer, not {cls.kind!r}; use actok.load"
            )
        return cls.from_artifact(artifact)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload to the Hugging Face Hub; `options` go to `HfApi.create_repo`. Returns the URL of the commit."""
        return push_artifact(self.to_artifact(), repo_id, **options)
