"""A learned tokenizer as two ONNX files, raw units in and raw units out, checked against the tokenizer itself.

    encoder.onnx   actions float32 [B, T, D] -> ids int64 [B, N], out_of_range int64 [B]
    decoder.onnx   ids int64 [B, N] -> actions float32 [B, T, D], valid bool [B]
    export.json    what they are: embodiment, action space, units, sizes, hashes, what is not in them

One embodiment and the fitted horizon; B is free. Normaliser, limits and the repair of 6-D rotations and quaternions are part
of the graphs. What `encode` and `decode` refuse with an error, a graph can only report: a value that is not a number
counts as out of range, and a sequence with an id outside its vocabulary gives NaN and valid = False.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actok.core import ActionTokenizer, ActokError, ChunkContext, ConfigError, MissingExtraError
from actok.core.files import write_bytes
from actok.tokenizers.embodiments import redundant_rotations

if TYPE_CHECKING:
    from actok.tokenizers.export_graphs import Graph
    from actok.tokenizers.neural import NeuralTokenizer

ENCODER, DECODER, FACTS = "encoder.onnx", "decoder.onnx", "export.json"
# Largest difference from the tokenizer itself, in normalised units (of values beyond 1: relative). Ids must be equal
# wherever the tokenizer's own stay the same when its input moves by as much.
TOLERANCE = 1e-5
# Rotations made proper divide by the lengths of what the network gave, which magnifies rounding.
ROTATION_TOLERANCE = 1e-3
# Chunks of the check, in calls of different sizes: one, few, many.
CHECK_BATCHES = (1, 7, 120)
NUDGES = 4

__all__ = ["Agreement", "ExportError", "OnnxExport", "export_onnx"]


class ExportError(ActokError):
    """A tokenizer has no ONNX form, or the one that was made does not do what the tokenizer does."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the files compare with the tokenizer, on random chunks and random sequences.

    Attributes:
        chunks: how many of each.
        ids_compared: share of the chunks whose ids do not hang on the last digits of the input; all of these agree.
        actions: largest difference of a decoded value in normalised units (rotations made proper aside).
    """

    chunks: int
    ids_compared: float
    actions: float


@dataclass(frozen=True, kw_only=True)
class OnnxExport:
    """The files written."""

    encoder: Path
    decoder: Path
    facts: Path
    embodiment: str
    agreement: Agreement


def export_onnx(
    tokenizer: ActionTokenizer, folder: str | Path, *, embodiment: str | None = None, opset: int = 20
) -> OnnxExport:
    """Write encoder.onnx, decoder.onnx and export.json for one embodiment (default: the tokenizer's first).

    The files are run by ONNX Runtime before they are written; where they differ from the tokenizer, nothing is written.

    Raises:
        ExportError: not a learned tokenizer, sequences of variable length, an operation that ONNX cannot express, or a
            result that differs. ConfigError: unknown opset. SpaceMismatchError: unknown embodiment.
            MissingExtraError: the extra `onnx` is not installed.
    """
    if not tokenizer.learned:
        raise ExportError(
            f"{type(tokenizer).__name__} is fitted in closed form and has no network to export; use it as it is, without"
            " torch"
        )
    _check_installed()
    from actok.tokenizers.neural import NeuralTokenizer  # first: it says if torch is missing

    import torch  # isort: skip

    from actok.tokenizers.export_graphs import DecoderGraph, EncoderGraph

    if not isinstance(tokenizer, NeuralTokenizer):
        raise ExportError(f"{type(tokenizer).__name__} is no NeuralTokenizer; export its network by its own means")
    if not isinstance(opset, int) or not 18 <= opset <= 23:
        raise ConfigError(f"opset is {opset!r}; give a whole number from 18 to 23")
    if tokenizer.codec.reads_state:
        raise ExportError(
            f"{tokenizer.kind} reads the robot's state and takes chunks of any length, which the two graphs have no inputs"
            " for; serve it with actok, or export a tokenizer that reads actions alone, e.g. fastervq or oat"
        )
    robot = tokenizer.embodiment(embodiment)
    name = robot.space.embodiment
    length = tokenizer.layout_for(None, name).fixed_length
    if length is None:
        raise ExportError(
            f"{tokenizer.kind} has sequences of variable length (byte-pair encoding), which ONNX cannot express; serve it"
            " with actok, or export a tokenizer whose sequences have one length, e.g. fastervq or oat"
        )
    graphs = {
        ENCODER: (EncoderGraph(tokenizer, name), torch.zeros(2, tokenizer.horizon, robot.space.dim), "actions"),
        DECODER: (DecoderGraph(tokenizer, name), torch.zeros(2, length, dtype=torch.int64), "ids"),
    }
    outputs = {ENCODER: ["ids", "out_of_range"], DECODER: ["actions", "valid"]}
    facts = {
        "actok_tokenizer": tokenizer.kind,
        "weights_hash": tokenizer.weights_hash,
        "embodiment": name,
        "horizon": str(tokenizer.horizon),
    }
    made = {
        file: _trace(graph, example, given, outputs[file], opset, facts)
        for file, (graph, example, given) in graphs.items()
    }
    agreement = _compare(tokenizer, name, made[ENCODER], made[DECODER])
    target = Path(folder)
    description = _describe(tokenizer, name, made, opset, agreement)
    paths = {file: write_bytes(target / file, content) for file, content in made.items()}
    told = write_bytes(target / FACTS, json.dumps(description, indent=2) + "\n")  # last: it holds the others' hashes
    return OnnxExport(encoder=paths[ENCODER], decoder=paths[DECODER], facts=told, embodiment=name, agreement=agreement)


# -- tracing and checking ---------------------------------------------------------------------------------------------


def _check_installed() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError(package, "onnx", "exporting to ONNX") from None


def _trace(graph: Graph, example: Any, given: str, outputs: list[str], opset: int, facts: dict[str, str]) -> bytes:
    """The ONNX file of a graph, of any batch size."""
    import torch

    batch = torch.export.Dim("batch")
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph.eval(),
                (example,),
                dynamo=True,
                input_names=[given],
                output_names=outputs,
                dynamic_shapes=({0: batch},),
                opset_version=opset,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"{type(graph.codec).__name__} cannot be expressed in ONNX ({reason}); serve it with actok, or write its"
            " operations so that torch.export can follow them"
        ) from error
    assert program is not None, "the exporter gives a program where it is not told a file"
    model = program.model
    for node in model.graph.all_nodes():  # where in which source file each was made: of no use, and of this machine
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_name = "actok"
    model.metadata_props.update(facts)
    return program.model_proto.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages and on its own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _compare(tokenizer: NeuralTokenizer, embodiment: str, encoder: bytes, decoder: bytes) -> Agreement:
    """Run both files on random chunks and sequences. Raises ExportError where they differ from the tokenizer."""
    rng = np.random.default_rng(0)
    context = ChunkContext(embodiment=embodiment)
    robot = tokenizer.embodiment(embodiment)
    normaliser, count = robot.normaliser, sum(CHECK_BATCHES)
    ends = np.cumsum(CHECK_BATCHES)[:-1]

    def run(model: bytes, name: str, values: np.ndarray) -> list[np.ndarray]:
        session = _session(model)
        found = [session.run(None, {name: part}) for part in np.split(values, ends)]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    chunks = _random_chunks(rng, count, tokenizer.horizon, normaliser)
    ids, outside = run(encoder, "actions", chunks)
    tokens = tokenizer.encode(chunks, context)
    expected = tokens.ids
    stable = np.ones(count, bool)
    for _ in range(NUDGES):
        sign = rng.choice([-1.0, 1.0], chunks.shape) * ~normaliser.constant  # whose whole range is smaller than that
        moved = tokenizer.encode((chunks + sign * TOLERANCE * normaliser.half).astype(np.float32), context)
        stable &= (moved.ids == expected).all(1) & (moved.out_of_range == tokens.out_of_range)
    wrong = stable & ((ids != expected).any(1) | (outside != tokens.out_of_range))
    if wrong.any() or stable.mean() < 0.5:
        raise ExportError(
            f"the encoder's ids differ from the tokenizer's on {wrong.sum()} of {stable.sum()} chunks ({count - stable.sum()}"
            " more hang on rounding); nothing was written: report this with the tokenizer's config"
        )

    vocab = tokenizer.layout_for(None, embodiment).vocab
    some = rng.integers(0, vocab, (count, len(vocab)))
    actions, valid = run(decoder, "ids", some)
    reference = tokenizer.decode(some, context).actions
    size = np.maximum(1.0, np.abs(normaliser(reference)))
    allowed = TOLERANCE * size * normaliser.half + 4 * np.spacing(np.abs(reference))
    turning = [d for g in redundant_rotations(robot.space) for d in g.dims]
    allowed[:, :, turning] = ROTATION_TOLERANCE
    difference = np.abs(actions - reference)
    if not valid.all() or not (difference <= allowed).all():  # not finite: neither
        worst = np.nanmax(difference / normaliser.half)
        raise ExportError(
            f"the decoder's actions differ from the tokenizer's by up to {worst:.1e} in normalised units; nothing was"
            " written: report this with the tokenizer's config"
        )
    plain = [d for d in range(robot.space.dim) if d not in turning]
    largest = (difference / normaliser.half)[:, :, plain].max(initial=0.0)
    return Agreement(chunks=count, ids_compared=float(stable.mean()), actions=float(largest))


def _random_chunks(rng: np.random.Generator, count: int, steps: int, normaliser: Any) -> np.ndarray:
    """Raw ramps with noise, float32 [B, T, D], which reach a little out of range."""
    first, last = rng.uniform(-1.1, 1.1, (2, count, 1, normaliser.dim))
    t = np.linspace(0, 1, steps)[:, None]
    x = first + (last - first) * t + 0.05 * rng.normal(size=(count, steps, normaliser.dim))
    middle, reach = (normaliser.lower + normaliser.upper) / 2, (normaliser.upper - normaliser.lower) / 2
    return ((middle + reach * x) * normaliser.half + normaliser.centre).astype(np.float32)


# -- export.json ------------------------------------------------------------------------------------------------------


def _describe(
    tokenizer: NeuralTokenizer, embodiment: str, made: dict[str, bytes], opset: int, agreement: Agreement
) -> dict[str, Any]:
    """export.json: everything that a program, or a person, needs to know to use the files."""
    from actok import __version__

    robot = tokenizer.embodiment(embodiment)
    space, layout = robot.space, tokenizer.layout_for(None, embodiment)
    limits = robot.normaliser.limits
    actions = {
        "name": "actions",
        "dtype": "float32",
        "shape": ["batch", tokenizer.horizon, space.dim],
        "what": "chunk in the raw units of the action space",
    }
    ids = {
        "name": "ids",
        "dtype": "int64",
        "shape": ["batch", layout.max_len],
        "what": "codes in the order of the token sequence, each from 0 to its position's vocab - 1",
    }
    outside = {
        "name": "out_of_range",
        "dtype": "int64",
        "shape": ["batch"],
        "what": "values of a chunk outside the range that the normaliser was made from, or not a number",
    }
    valid = {
        "name": "valid",
        "dtype": "bool",
        "shape": ["batch"],
        "what": "False where an id is outside its vocabulary; the actions are then NaN",
    }
    return {
        "actok_version": __version__,
        "tokenizer": tokenizer.kind,
        "weights_hash": tokenizer.weights_hash,
        "embodiment": embodiment,
        "horizon": tokenizer.horizon,
        "tokens": layout.max_len,
        "vocab": layout.vocab.tolist(),
        "dimensions": _dimensions(space, limits),
        "space": space.to_dict(),
        "opset": opset,
        "files": {
            ENCODER: {"sha256": _sha256(made[ENCODER]), "inputs": [actions], "outputs": [ids, outside]},
            DECODER: {"sha256": _sha256(made[DECODER]), "inputs": [ids], "outputs": [actions, valid]},
        },
        "in_the_files": [
            "normaliser, and its inverse",
            "limits: a decoded value beyond them is moved to them",
            *(
                ["decoded 6-D rotations are made orthonormal, quaternions of length 1"]
                if redundant_rotations(space)
                else []
            ),
        ],
        "not_in_the_files": [
            "padding: fill the steps after an episode's end with 0 where a dimension is incremental, else with its last value",
            "absent dimensions (dof_mask): all of the embodiment's are taken to be there",
            "horizons other than the fitted one",
            *(["sequences cut short (prefixes)"] if layout.prefixes else []),
            "counts of what limits moved",
        ],
        "agreement": asdict(agreement),
    }


def _dimensions(space: Any, limits: Any) -> list[dict[str, Any]]:
    """Name, unit (of a raw value times scale), mode and limits of each dimension, in order."""
    rows = []
    for d, name in enumerate(space.names):
        group = next(g for g in space.groups if d in g.dims)
        rows.append(
            {
                "name": name,
                "kind": group.kind,
                "unit": group.unit,
                "scale": group.scale,
                "mode": group.mode,
                "incremental": bool(space.incremental[d]),
                "limits": None if limits is None else [float(limits[0][d]), float(limits[1][d])],
            }
        )
    return rows


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
