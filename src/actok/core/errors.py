"""Errors a user can meet. Every message names the offending value and the remedy, in one line."""

from __future__ import annotations


class ActokError(ValueError):
    """Base of all errors that actok raises on purpose; the CLI prints it as one line."""


class ConfigError(ActokError):
    """A setting, preset name or combination of settings cannot be used."""


class DataError(ActokError):
    """A dataset is missing, corrupt, empty, or holds values no tokenizer can accept."""


class SpaceMismatchError(ActokError):
    """Data of one action space was given to a tokenizer, reader or environment of another."""


class TokenError(ActokError):
    """Token ids are outside the vocabulary, of the wrong type, or of an impossible shape."""


class ArtifactError(ActokError):
    """A saved tokenizer is missing files, truncated, edited, or of an unknown schema."""


class MissingExtraError(ActokError, ImportError):
    """An optional dependency is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self._parts = (package, extra, purpose)
        super().__init__(f"{purpose} needs {package}; install it with: pip install 'actok[{extra}]'")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), self._parts  # so that it crosses from a worker process


def follows_interrupt(error: BaseException | None) -> bool:
    """True where Ctrl-C is behind an error: compiled code (numba) turns it into a SystemError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
