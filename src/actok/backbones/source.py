"""Where a foundation model's files are, what they hash to, and its weights and tokenizer loaded from them."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actok.core.errors import ConfigError, MissingExtraError

WEIGHTS = ("*.safetensors", "*.bin")
# What loading reads beside the weights: configuration, tokenizer, preprocessing, pooling.
READ = ("*.json", "*.jinja", "*.txt", "*.model", "1_Pooling/*.json")
# Files that say nothing about the features: who trained it, on what, how it generates text.
UNREAD = ("README.md", "generation_config.json", "data_config.json", "trainer_state.json", "training_args.json")

__all__ = ["ModelSource", "find_model", "load_network", "load_text_tokenizer", "require_transformers"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model's folder on this machine.

    Attributes:
        folder: where config.json and the weights are.
        name: the Hub id, or the folder's last component; no path of this machine.
        config: config.json.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """config.json's model_type, by which the adapter is chosen."""
        return str(self.config["model_type"])

    def weight_files(self) -> list[Path]:
        """The safetensors files, or where there are none PyTorch's, sorted.

        Raises ConfigError where there is neither.
        """
        for pattern in WEIGHTS:
            if found := sorted(self.folder.glob(pattern)):
                return found
        raise ConfigError(f"{self.folder} holds no weights ({' or '.join(WEIGHTS)}); download the whole model")

    def content_hash(self) -> str:
        """sha256 over the names and bytes of every file that decides the features, wherever the folder lies.

        Reads the weights once: about a second for each gigabyte.
        """
        files = {p for pattern in READ for p in self.folder.glob(pattern) if p.name not in UNREAD}
        total = hashlib.sha256()
        for path in sorted(files | set(self.weight_files())):
            with open(path, "rb") as stream:
                one = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{path.relative_to(self.folder).as_posix()} {one}\n".encode())
        return total.hexdigest()

    def read(self, name: str) -> Any:
        """The object or list in a JSON file of the folder, None where there is none. Raises ConfigError where it cannot be read."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}; download the model again") from None
        if not isinstance(value, (dict, list)):
            raise ConfigError(f"{path} holds {value!r}; download the model again")
        return value


def find_model(spec: str | Path) -> ModelSource:
    """The model in a local folder, or downloaded by Hub id ("owner/name", "owner/name@revision").

    Weights come as safetensors; pickled ones (*.bin) are fetched only where a repository has nothing else, and read by
    torch's weights-only loader.

    Raises:
        ConfigError: there is no such folder or Hub id, or its config.json names no model_type.
        MissingExtraError: a Hub id without huggingface_hub installed.
    """
    folder = Path(spec).expanduser()
    name = folder.resolve().name
    if not folder.is_dir():
        name = str(spec)
        folder = _download(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{spec} has no config.json; name a model's folder or Hub id")
    source = ModelSource(folder=folder, name=name, config={})
    config = source.read("config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(
            f"{spec}: config.json names no model_type; name a folder that transformers' save_pretrained wrote"
        )
    return ModelSource(folder=folder, name=name, config=config)


def _download(spec: str) -> Path:
    name, _, revision = spec.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{spec!r} is neither a folder nor a Hub id (owner/name, owner/name@revision)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "transformers", f"loading {spec} from the Hub") from error
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[*READ, WEIGHTS[0]]))
        if not any(folder.glob(WEIGHTS[0])):
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[*READ, WEIGHTS[1]]))
    except Exception as error:  # the Hub's client has a dozen kinds: no network, no such model, no permission
        raise ConfigError(f"{spec} is no folder here and could not be had from the Hub: {_reason(error)}") from error
    return folder


def require_transformers(purpose: str) -> Any:
    """The module `transformers`. Raises MissingExtraError naming the extra that installs it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers", purpose) from error


def load_network(
    source: ModelSource, class_name: str, *, device: str, dtype: str | None, unused: tuple[str, ...] = ()
) -> nn.Module:
    """The weights in a class of transformers: frozen, in evaluation mode, on the device.

    Args:
        source: the model's files.
        class_name: the class, such as "CLIPModel".
        device: as torch names it.
        dtype: "float32", "bfloat16" or "float16"; None is float32 on the CPU and the checkpoint's own elsewhere.
        unused: prefixes of weights that the checkpoint may lack.

    Raises:
        ConfigError: the installed transformers has no such class, the dtype is unknown, or the checkpoint lacks weights
            (transformers alone would fill them with random numbers).
        MissingExtraError: transformers is not installed.
    """
    transformers = require_transformers(f"loading {source.name}")
    cls = getattr(transformers, class_name, None)
    if cls is None:
        raise ConfigError(
            f"transformers {transformers.__version__} has no {class_name}, which {source.name} needs; install a newer one"
        )
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {dtype!r} is unknown; choose float32, bfloat16 or float16")
    chosen = dtype or ("float32" if torch.device(device).type == "cpu" else "auto")
    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    source.weight_files()
    try:
        with _quiet(transformers):
            network, info = cls.from_pretrained(
                source.folder,
                output_loading_info=True,
                local_files_only=True,
                **{"dtype" if version >= (4, 56) else "torch_dtype": chosen},
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(f"{source.name} cannot be loaded as {class_name}: {_reason(error)}") from error
    missing = sorted(k for k in map(str, info["missing_keys"]) if not k.startswith(unused))
    if missing:
        raise ConfigError(
            f"{source.name} lacks {len(missing)} weights of {class_name} (first: {missing[0]}); download the whole model"
        )
    return network.to(device).eval().requires_grad_(False)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' bar over the weights and its report on them: what is missing is an error here."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _reason(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_text_tokenizer(source: ModelSource) -> Any:
    """The model's text tokenizer: from tokenizer.json where there is one (no sentencepiece needed), else as transformers
    finds it.

    Raises:
        ConfigError: it cannot be loaded, or is not of the fast kind, which alone says where in the text a token stands.
    """
    transformers = require_transformers(f"loading the tokenizer of {source.name}")
    direct = (source.folder / "tokenizer.json").is_file()
    cls = transformers.PreTrainedTokenizerFast if direct else transformers.AutoTokenizer
    try:
        tokenizer = cls.from_pretrained(source.folder, local_files_only=True)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the tokenizer of {source.name} cannot be loaded: {reason}; add its tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{source.name} has no tokenizer.json; convert its tokenizer to the fast kind and save it there"
        )
    return tokenizer
