"""A saved policy, complete in its folder: nothing of it is looked for elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any

from actok.backbones.decoder import DecoderBackbone
from actok.core import ActionTokenizer, ArtifactError, find_class, read_artifact
from actok.core.artifact import CONFIG_FILE, TENSOR_FILE, locate
from actok.policies.prompt import StateRange
from actok.policies.vla import BACKBONE, KIND, TOKENIZER, VERSION, VLA, VLAConfig, integrity
from actok.policies.vocab import VocabularyMap

__all__ = ["is_policy", "load_policy", "policy_integrity"]


def is_policy(folder: str | Path) -> bool:
    """Whether a local folder holds a policy (complete or not)."""
    try:
        body = json.loads((Path(folder) / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(body, dict) and "policy" in body and "tokenizer" in body


def policy_integrity(folder_or_hub_id: str | Path, *, revision: str | None = None) -> str:
    """Hash of a saved policy: of all that its config.json says, hashes of its files included. Raises as `load_policy`."""
    return _checked_body(folder_or_hub_id, locate(folder_or_hub_id, revision))[0]


def _checked_body(folder_or_hub_id: str | Path, folder: Path) -> tuple[str, dict[str, Any]]:
    """Its hash, and what config.json says."""
    if not is_policy(folder):
        raise ArtifactError(_no_policy(folder_or_hub_id, folder))
    body = json.loads((folder / CONFIG_FILE).read_bytes())
    version = body.get("schema_version")
    if body["policy"] != KIND or version != VERSION:
        raise ArtifactError(
            f"{folder_or_hub_id} holds a policy {body['policy']!r} of version {version}, this actok reads"
            f" {KIND!r} of version {VERSION}; upgrade actok, or train it again"
        )
    claimed = body.pop("integrity", None)
    if claimed != integrity(body):
        raise ArtifactError(
            f"{folder / CONFIG_FILE} was edited after saving (integrity hash {'is gone' if claimed is None else 'differs'});"
            " copy it again, or change settings in training"
        )
    return claimed, body


def _no_policy(named: str | Path, folder: Path) -> str:
    """What is there instead of a policy, and what to do."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return f"{named} holds no policy, for want of a {CONFIG_FILE}; name a folder that `actok train-policy` wrote, whole"
    try:
        body = json.loads(path.read_bytes())
    except ValueError as error:
        return f"{path} is truncated or edited, no longer JSON ({error}); copy it again"
    if isinstance(body, dict) and "tokenizer" in body:
        return (
            f"{named} holds a tokenizer, no policy; train one that acts through it (actok train-policy --tokenizer"
            f" {named} ...) and name its folder"
        )
    return f"{named} holds no policy; name a folder that `actok train-policy` wrote"


def load_policy(folder_or_hub_id: str | Path, *, device: Any = "cpu", revision: str | None = None) -> VLA:
    """What `save_pretrained` wrote, in evaluation mode.

    Raises ArtifactError naming what is missing, truncated, edited or too new.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = locate(folder_or_hub_id, revision)
    _, body = _checked_body(folder_or_hub_id, folder)
    checked = {name: _checked(folder, name, expected) for name, expected in body.get("files", {}).items()}
    tokenizer: ActionTokenizer
    artifact = read_artifact(folder / TOKENIZER)
    tokenizer = find_class(artifact.kind).from_artifact(artifact)
    if artifact.weights_hash != body["tokenizer"]:
        raise ArtifactError(f"{folder / TOKENIZER} is another tokenizer than the policy was trained on; copy it again")
    try:
        prefix = f"{BACKBONE}/"
        files = {name.removeprefix(prefix): p.read_bytes() for name, p in checked.items() if name.startswith(prefix)}
        policy = VLA(
            backbone_from(body["backbone"], files),
            tokenizer,
            VLAConfig(**{**body["config"], "heads": tuple(body["config"]["heads"])}),
            VocabularyMap.from_dict(body["vocabulary"]),
            embodiment=body["embodiment"],
            horizon=body["horizon"],
            views=tuple(body["views"]),
            state=None if body["state"] is None else StateRange.from_dict(body["state"]),
            meta=body["meta"],
        )
        policy.load_state_dict(load_file(checked[TENSOR_FILE]))  # mapped: the weights are in memory once
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ArtifactError(
            f"{folder_or_hub_id} does not describe a whole policy ({type(error).__name__}: {reason}); copy it again"
        ) from error
    return policy.to(device).eval()


def backbone_from(spec: Mapping[str, Any], files: Mapping[str, bytes]) -> DecoderBackbone:
    """The untrained twin that `spec` and `files` describe."""
    if spec["kind"] == "tiny":
        from actok.policies.tiny import TinyVLM

        return TinyVLM.from_spec(spec, files)
    from actok.backbones.policy_models import backbone_from_spec

    return backbone_from_spec(spec, files)


def _checked(folder: Path, name: str, expected: str) -> Path:
    """The file, which is what was saved."""
    path = folder / name
    if not path.is_file():
        raise ArtifactError(f"{folder} lacks {name}; copy the whole folder")
    with open(path, "rb") as stream:
        found = file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ArtifactError(f"{path} is truncated or edited (sha256 differs); copy it again")
    return path
