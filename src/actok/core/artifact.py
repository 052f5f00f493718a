"""The artifact format: config.json + model.safetensors + plain side files, hashed. No pickle, no remote code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actok.core.errors import ArtifactError

SCHEMA_VERSION = 1
CONFIG_FILE = "config.json"
TENSOR_FILE = "model.safetensors"

# How a config of version n becomes one of version n + 1. A new schema version adds one entry; none is ever removed.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

__all__ = [
    "Artifact",
    "artifact_files",
    "check_folder",
    "locate",
    "push_artifact",
    "read_artifact",
    "write_artifact",
    "write_folder",
]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A tokenizer as data.

    Attributes:
        kind: `ActionTokenizer.kind`.
        config: the config dataclass as a dict of JSON values.
        embodiments: action space and normaliser by name, in order; the first is the default.
        horizon: fitted T.
        tensors: fitted arrays.
        files: further files by name (e.g. tokenizer.json), as bytes.
        meta: free facts for a reader (version, what it was fitted on); not part of any hash.
    """

    kind: str
    config: Mapping[str, Any]
    embodiments: Mapping[str, Mapping[str, Any]]
    horizon: int
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights_hash(self) -> str:
        """sha256 over kind, config, horizon, tensors and files."""
        digest = hashlib.sha256(_canonical([self.kind, dict(self.config), self.horizon]))
        for name in sorted(self.tensors):
            array = np.ascontiguousarray(self.tensors[name])
            digest.update(_canonical([name, str(array.dtype), list(array.shape)]))
            digest.update(array.tobytes())
        for name in sorted(self.files):
            digest.update(_canonical([name]))
            digest.update(self.files[name])
        return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a folder of files so that it is complete or unchanged: beside it first, then one rename.

    Raises ArtifactError where the target is not a folder, holds files that are not of an artifact, such as another
    model's config.json, or holds a policy where a tokenizer is written, or the other way round.
    """
    folder = folder.resolve()  # a link stays one: the folder it leads to is replaced
    foreign = _kept(folder, files, policy=_is_policy(json.loads(files.get(CONFIG_FILE, b"{}"))))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        if folder.exists():
            retired = temporary.with_name(temporary.name + "-old")
            for name in foreign:  # keep what a user put beside the artifact (a README, a training log)
                (shutil.copytree if (folder / name).is_dir() else shutil.copy2)(folder / name, temporary / name)
            folder.rename(retired)
            temporary.rename(folder)
            shutil.rmtree(retired)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def check_folder(folder: str | Path, *, policy: bool) -> None:
    """Raise ArtifactError where `write_folder` would refuse to save a policy (else a tokenizer) there.

    What takes long asks before it begins.
    """
    _kept(Path(folder).resolve(), (CONFIG_FILE, TENSOR_FILE), policy=policy)


def _kept(folder: Path, files: Iterable[str], *, policy: bool) -> list[str]:
    """Names in a folder that stay beside these files. Raises ArtifactError where the files must not be written there."""
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; name a folder")
    present = {p.name for p in folder.iterdir()} if folder.exists() else set()
    body = _artifact_body(folder)
    replaced = set() if body is None else {CONFIG_FILE, *(name.partition("/")[0] for name in body.get("files", ()))}
    if body is not None and _is_policy(body) != policy:
        raise ArtifactError(
            f"{folder} holds a {'policy' if _is_policy(body) else 'tokenizer'}, which would be lost; name a new or empty folder"
        )
    foreign = sorted(present - {name.partition("/")[0] for name in files} - replaced)
    if not replaced and (foreign or CONFIG_FILE in present):
        found = CONFIG_FILE if CONFIG_FILE in present else foreign[0]
        what = "policy" if policy else "tokenizer"
        raise ArtifactError(f"{folder} holds {found!r} and no {what}; name a new or empty folder")
    return foreign


def _artifact_body(folder: Path) -> dict[str, Any] | None:
    """What the config.json of the artifact that a folder holds says; None where it holds none of this library."""
    try:
        body = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return body if _is_artifact(body) else None


def _is_artifact(body: Any) -> bool:
    return isinstance(body, dict) and "schema_version" in body and "tokenizer" in body


def _is_policy(body: Any) -> bool:
    return isinstance(body, dict) and "policy" in body


def artifact_files(artifact: Artifact) -> dict[str, bytes]:
    """The files of a saved artifact by name: what `write_artifact` writes, for a folder that holds more than it."""
    from safetensors.numpy import save

    from actok import __version__

    files = dict(artifact.files)
    files[TENSOR_FILE] = save({k: np.ascontiguousarray(v) for k, v in artifact.tensors.items()})
    body = {
        "schema_version": SCHEMA_VERSION,
        "tokenizer": artifact.kind,
        "horizon": artifact.horizon,
        "config": dict(artifact.config),
        "embodiments": {k: dict(v) for k, v in artifact.embodiments.items()},
        "embodiment_order": list(artifact.embodiments),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
        "weights_hash": artifact.weights_hash,
        "meta": {"actok_version": __version__, **artifact.meta},
    }
    body["integrity"] = hashlib.sha256(_canonical(body)).hexdigest()
    files[CONFIG_FILE] = (json.dumps(body, indent=2) + "\n").encode()
    return files


def write_artifact(artifact: Artifact, folder: Path) -> Path:
    """Save atomically; returns the folder."""
    return write_folder(folder, artifact_files(artifact))


def push_artifact(artifact: Artifact, repo_id: str, **options: Any) -> str:
    """Upload as one commit; returns its URL."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(repo_id, exist_ok=True, **options)
    operations = [CommitOperationAdd(name, content) for name, content in artifact_files(artifact).items()]
    return str(api.create_commit(repo_id, operations, commit_message="Upload action tokenizer").commit_url)


def locate(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or the download of a Hub id. Raises ArtifactError where there is neither."""
    path = Path(folder_or_hub_id)
    if path.exists():
        return path
    name = str(folder_or_hub_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ArtifactError(f"{name} does not exist; give a folder written by save_pretrained, or a Hub id 'user/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"{name} is neither a local folder nor reachable on the Hub ({type(error).__name__}); check the name"
            " and the connection"
        ) from error


def read_artifact(folder_or_hub_id: str | Path, *, revision: str | None = None) -> Artifact:
    """Load and check an artifact. Raises ArtifactError naming what is missing, truncated, edited or too new."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = locate(folder_or_hub_id, revision)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {CONFIG_FILE}; give a folder written by save_pretrained")
    try:
        body = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(
            f"{path} is not JSON ({error}); the file is truncated or edited, save the tokenizer again"
        ) from None
    if _is_policy(body):
        raise ArtifactError(
            f"{folder} holds a policy, not a tokenizer; its tokenizer is {folder / 'tokenizer'}, the policy is for"
            " load_policy and `actok rollout`"
        )
    if not _is_artifact(body):
        raise ArtifactError(f"{path} does not describe an actok tokenizer; give a folder written by save_pretrained")
    claimed = body.pop("integrity", None)
    if claimed != hashlib.sha256(_canonical(body)).hexdigest():
        raise ArtifactError(f"{path} was edited after saving (integrity hash differs); save or fit the tokenizer again")
    version = body["schema_version"]
    if not isinstance(version, int) or version > SCHEMA_VERSION or version < 1:
        raise ArtifactError(
            f"{path} has schema version {version}, this actok reads up to {SCHEMA_VERSION}; upgrade actok"
        )
    while body["schema_version"] < SCHEMA_VERSION:
        body = MIGRATIONS[body["schema_version"]](body)
    contents: dict[str, bytes] = {}
    for name, expected in body["files"].items():
        part = folder / name
        if not part.is_file():
            raise ArtifactError(f"{folder} lacks {name}; copy the whole folder or save the tokenizer again")
        contents[name] = part.read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise ArtifactError(
                f"{part} is truncated or edited (sha256 differs); copy it again or save the tokenizer again"
            )
    try:
        tensors = load(contents.pop(TENSOR_FILE))
    except SafetensorError as error:
        raise ArtifactError(f"{folder / TENSOR_FILE} cannot be read ({error}); save the tokenizer again") from None
    artifact = Artifact(
        kind=body["tokenizer"],
        config=body["config"],
        embodiments={name: body["embodiments"][name] for name in body["embodiment_order"]},
        horizon=body["horizon"],
        tensors=tensors,
        files=contents,
        meta=body["meta"],
    )
    if artifact.weights_hash != body["weights_hash"]:
        raise ArtifactError(f"{folder} does not match its weights hash; save or fit the tokenizer again")
    return artifact
