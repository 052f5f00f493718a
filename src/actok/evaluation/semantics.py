"""Is it semantic? What the codes of a fitted tokenizer say about task, phase, verb and words, level by level.

docs/semantics.md defines every figure. Each function that measures one thing stands in a module of its own (levels,
information, probes, retrieval, substitution); here they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from actok.core import ActionTokenizer, ActokError, DataError, to_numpy
from actok.evaluation.information import Information, label_information
from actok.evaluation.labelled import LabelledChunks, LabelledData
from actok.evaluation.levels import LevelCodes, LevelUse, level_use, split_levels
from actok.evaluation.probes import Probe, linear_probe
from actok.evaluation.retrieval import Retrieval, retrieval
from actok.evaluation.robustness import NOISE, edit_distance
from actok.evaluation.substitution import Substitution, substitution

# What probes and information are asked about.
LABELS = ("task", "phase", "verb")
INFORMED = ("task", "instruction", "phase", "verb")
# Levels that are judged by themselves; what is beyond counts in the whole sequence only.
MAX_LEVELS = 8
# Chunks of the noise test (edit distances) and of the map (t-SNE).
NOISE_CHUNKS, MAP_CHUNKS = 256, 500
# Codes that are shown with their words and motion, and how many instructions of each.
SHOWN_CODES, SHOWN_WORDS = 10, 3

__all__ = [
    "CodeExample",
    "CodeMap",
    "LabelledChunks",
    "LabelledData",
    "LevelSemantics",
    "NoiseByLevel",
    "Semantics",
    "measure_semantics",
    "raw_probes",
    "raw_retrieval",
]


@dataclass(frozen=True, kw_only=True)
class NoiseByLevel:
    """Token error rates under Gaussian noise on normalised actions.

    Attributes:
        sigma: standard deviations.
        error_rate: of whole sequences: edit distance over the tokens of the clean sequence (above 1 is possible where
            lengths vary), X-Tokenizer's "WER" of the codes.
        by_level: share of changed codes of each level at each sigma; empty where a tokenizer has no levels.
    """

    sigma: tuple[float, ...]
    error_rate: tuple[float, ...]
    by_level: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class LevelSemantics:
    """One level, or the whole sequence (level None).

    Attributes:
        level: q, or None.
        use: perplexity and use of the codes.
        probes: by label.
        information: by label.
        missing: label -> why there is no figure for it.
    """

    level: int | None
    use: LevelUse
    probes: Mapping[str, Probe]
    information: Mapping[str, Information]
    missing: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class CodeMap:
    """A picture of test chunks by their first-level codes.

    Attributes:
        points: float64 [n, 2], t-SNE of the bags of codes.
        labels: label name -> int64 [n].
    """

    points: Float[np.ndarray, "n two"]
    labels: Mapping[str, Int[np.ndarray, "n"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class CodeExample:
    """One of the most used first-level codes.

    Attributes:
        symbol: its number within the level.
        share: of all first-level codes of the test chunks.
        chunks: test chunks that have it.
        words: the instructions it occurs under most, each with its share of these chunks.
        motion: float64 [T, D] mean of what these chunks decode to, normalised units; None where none decodes.
    """

    symbol: int
    share: float
    chunks: int
    words: tuple[tuple[str, float], ...]
    motion: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Semantics:
    """Everything about one tokenizer on one dataset. What could not be measured is None, with the reason in `missing`."""

    levels: tuple[LevelSemantics, ...]
    levels_of: int
    noise: NoiseByLevel
    retrieval: Retrieval | None
    substitution: tuple[Substitution, ...]
    map: CodeMap | None
    examples: tuple[CodeExample, ...]
    missing: Mapping[str, str] = field(default_factory=dict)


def measure_semantics(
    tokenizer: ActionTokenizer, data: LabelledData, embodiment: str | None = None, *, seed: int = 0
) -> Semantics:
    """Measure a fitted tokenizer that can serve `data` under the name `embodiment`. docs/semantics.md defines the figures."""
    layout = tokenizer.layout_for(data.test.actions.shape[1], embodiment)
    train_tokens = tokenizer.encode(data.train.actions, data.train.context(embodiment))
    test_tokens = tokenizer.encode(data.test.actions, data.test.context(embodiment))
    train, test = split_levels(train_tokens, layout), split_levels(test_tokens, layout)
    named = sum(c.level is not None for c in test)
    shown = [i for i, c in enumerate(test) if c.level is None or i < MAX_LEVELS]
    missing: dict[str, str] = {}

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except ActokError as error:
            missing[name] = str(error)
            return None

    if not named:
        missing["levels"] = "its sequences have no levels, so only whole sequences are judged"
    fixed = layout.fixed_length is not None
    if not fixed:
        missing["substitution"] = "its positions mean nothing by themselves, so no code is likely at one"
    variants: tuple[Substitution, ...] = ()
    if fixed:
        ids = to_numpy(train_tokens.ids), to_numpy(test_tokens.ids)
        with_state = data.train.anchor is not None and data.test.anchor is not None
        tried = [
            attempt("substitution", lambda s=state: _substitute(tokenizer, data, embodiment, ids, s, seed))  # type: ignore[misc]
            for state in ([False, True] if with_state else [False])
        ]
        variants = tuple(t for t in tried if t is not None)
    decoded = to_numpy(tokenizer.decode(test_tokens, data.test.context(embodiment)).actions)
    return Semantics(
        levels=tuple(_level(train[i], test[i], data, seed) for i in shown),
        levels_of=named,
        noise=_noise(tokenizer, data, embodiment, seed),
        retrieval=attempt("retrieval", lambda: _retrieve(train[0].bags, test[0].bags, data, seed)),
        substitution=variants,
        map=attempt("map", lambda: _map(test[0], data, seed)),
        examples=_examples(test[0], data, decoded),
        missing=missing,
    )


def raw_probes(data: LabelledData, *, seed: int = 0) -> dict[str, Probe]:
    """The same linear probes on the chunks themselves: normalised values of every step, padding as it is filled.

    What a linear model reads off the motion; codes are a non-linear function of it and may exceed it. Labels that cannot
    be probed are left out.
    """

    train, test = _raw_values(data)
    found = {}
    for name in LABELS:
        probe = _probe(train, test, data, name, seed)
        if isinstance(probe, Probe):
            found[name] = probe
    return found


def raw_retrieval(data: LabelledData, *, seed: int = 0) -> Retrieval | str:
    """The same retrieval from the chunks themselves, or why there is none.

    The linear map reads the normalised values of every step, with a constant beside them (bags of codes have one in
    their sum), scaled to a mean square norm of 1, which is that of a bag of distinct codes: so the ridge weighs as much.
    """
    train, test = (np.pad(values, ((0, 0), (0, 1)), constant_values=1.0) for values in _raw_values(data))
    scale = np.sqrt(np.mean((train**2).sum(1)))
    try:
        return _retrieve(train / scale, test / scale, data, seed)
    except DataError as error:
        return str(error)


def _raw_values(data: LabelledData) -> tuple[Float[np.ndarray, "n F"], Float[np.ndarray, "m F"]]:
    """Training and test chunks as rows of normalised values, over the root of their number."""

    def values(chunks: LabelledChunks) -> Float[np.ndarray, "B _"]:
        moving = ~data.normaliser.constant
        flat = data.normaliser(chunks.actions)[:, :, moving].reshape(len(chunks), -1)
        return flat.astype(np.float64) / np.sqrt(max(1, flat.shape[1]))

    return values(data.train), values(data.test)


def _probe(train: Any, test: Any, data: LabelledData, name: str, seed: int) -> Probe | str:
    """The probe, or why there is none."""
    if name not in data.names:
        return f"the data name no {name}"
    a, b = (np.flatnonzero(part.labels[name] >= 0) for part in (data.train, data.test))
    try:
        return linear_probe(
            train[a],
            data.train.labels[name][a],
            data.train.episode[a],
            test[b],
            data.test.labels[name][b],
            data.test.episode[b],
            seed=seed,
        )
    except DataError as error:
        return str(error)


def _level(train: LevelCodes, test: LevelCodes, data: LabelledData, seed: int) -> LevelSemantics:
    probes, information, missing = {}, {}, {}
    for name in LABELS:
        probe = _probe(train.bags, test.bags, data, name, seed)
        if isinstance(probe, Probe):
            probes[name] = probe
        else:
            missing[name] = probe
    for name in INFORMED:
        if name not in data.names:
            missing[name] = f"the data name no {name}"
            continue
        rows = np.flatnonzero(data.test.labels[name] >= 0)
        try:
            information[name] = label_information(
                test.take(rows), data.test.labels[name][rows], data.test.episode[rows], seed=seed
            )
        except DataError as error:
            missing[name] = str(error)
    return LevelSemantics(
        level=test.level, use=level_use(test), probes=probes, information=information, missing=missing
    )


def _noise(tokenizer: ActionTokenizer, data: LabelledData, embodiment: str | None, seed: int) -> NoiseByLevel:
    """As `robustness.noise_stability`, by edit distance for every tokenizer, and by level."""
    test = data.test.take(_thin(len(data.test), NOISE_CHUNKS))
    context = test.context(embodiment)
    layout = tokenizer.layout_for(test.actions.shape[1], embodiment)
    clean = tokenizer.encode(test.actions, context)
    half = np.where(data.normaliser.constant, 0.0, data.normaliser.half)
    draw = np.random.default_rng(seed).standard_normal(test.actions.shape) * half
    levels = [c.level for c in split_levels(clean, layout) if c.level is not None][:MAX_LEVELS]
    rates, by_level = [], []
    for sigma in NOISE:
        noisy = tokenizer.encode((test.actions + sigma * draw).astype(np.float32), context)
        changed = edit_distance([to_numpy(s) for s in clean], [to_numpy(s) for s in noisy])
        rates.append(float(changed.sum() / max(1, clean.lengths.sum())))
        if levels:
            differs = to_numpy(clean.ids) != to_numpy(noisy.ids)
            by_level.append([float(differs[:, layout.coords[:, 0] == q].mean()) for q in levels])
    return NoiseByLevel(
        sigma=NOISE, error_rate=tuple(rates), by_level=tuple(zip(*by_level, strict=True)) if levels else ()
    )


def _retrieve(train: Any, test: Any, data: LabelledData, seed: int) -> Retrieval:
    """`train`, `test`: a row a chunk."""
    if data.train.features is None:
        raise DataError("retrieval needs a teacher's features; give --features DIR")
    if "instruction" not in data.names:
        raise DataError("the data name no instruction")
    a, b = (np.flatnonzero(part.labels["instruction"] >= 0) for part in (data.train, data.test))
    return retrieval(
        train[a],
        data.train.labels["instruction"][a],
        data.train.features[a],
        test[b],
        data.test.labels["instruction"][b],
        seed=seed,
    )


def _substitute(
    tokenizer: ActionTokenizer,
    data: LabelledData,
    embodiment: str | None,
    ids: tuple[Int[np.ndarray, "n N"], Int[np.ndarray, "m N"]],
    state: bool,
    seed: int,
) -> Substitution:
    """`ids` of all training and test chunks."""
    if "instruction" not in data.names:
        raise DataError("the data name no instruction")
    a, b = (np.flatnonzero(part.labels["instruction"] >= 0) for part in (data.train, data.test))
    train, test = data.train.take(a), data.test.take(b)
    # What a text encoder reads: the instruction, and the sub-task where there is one.
    phases = len(data.names.get("phase", ())) + 1
    steps = [p.labels["phase"] + 1 if "phase" in p.labels else np.zeros(len(p), np.int64) for p in (train, test)]
    texts = [p.labels["instruction"] * phases + step for p, step in zip((train, test), steps, strict=True)]
    return substitution(
        tokenizer,
        tokenizer.layout_for(test.actions.shape[1], embodiment),
        train_ids=ids[0][a],
        train_text=texts[0],
        train_instruction=train.labels["instruction"],
        train_phase=steps[0],
        train_state=train.anchor if state else None,
        test_ids=ids[1][b],
        test_text=texts[1],
        test_instruction=test.labels["instruction"],
        test_phase=steps[1],
        test_state=test.anchor if state else None,
        actions=test.actions,
        context=test.context(embodiment),
        space=data.space,
        normaliser=data.normaliser,
        seed=seed,
    )


def _map(test: LevelCodes, data: LabelledData, seed: int) -> CodeMap:
    """t-SNE (van der Maaten and Hinton 2008) of the bags of codes, after their 30 strongest directions."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise DataError(
            "the map of codes needs scikit-learn; install it with: pip install 'actok[semantics]'"
        ) from None
    rows = _thin(len(test), MAP_CHUNKS)
    if len(rows) < 10:
        raise DataError(f"{len(rows)} test chunks are too few for a map; give at least 10")
    bags = test.bags[rows].toarray()
    left, strength, _ = np.linalg.svd(bags - bags.mean(0), full_matrices=False)
    found = TSNE(init="pca", perplexity=min(30.0, (len(rows) - 1) / 3), random_state=seed, max_iter=500)
    points = found.fit_transform((left * strength)[:, :30])
    return CodeMap(points=points.astype(np.float64), labels={k: v[rows] for k, v in data.test.labels.items()})


def _examples(test: LevelCodes, data: LabelledData, decoded: Float[np.ndarray, "B T D"]) -> tuple[CodeExample, ...]:
    counts = np.bincount(test.symbols, minlength=test.size)
    motion = data.normaliser(decoded)
    words = data.test.labels.get("instruction")
    chunk = np.repeat(np.arange(len(test)), test.lengths)
    found = []
    for symbol in np.argsort(-counts, kind="stable")[:SHOWN_CODES]:
        if not counts[symbol]:
            break
        rows = np.unique(chunk[test.symbols == symbol])
        told = np.empty(0, np.int64) if words is None else words[rows][words[rows] >= 0]
        which, times = np.unique(told, return_counts=True)
        best = np.argsort(-times, kind="stable")[:SHOWN_WORDS]
        decodes = rows[np.isfinite(decoded[rows]).all((1, 2))]
        found.append(
            CodeExample(
                symbol=int(symbol),
                share=float(counts[symbol] / counts.sum()),
                chunks=len(rows),
                words=tuple((data.names["instruction"][which[i]], float(times[i] / len(rows))) for i in best),
                motion=motion[decodes].mean(0).astype(np.float64) if len(decodes) else None,
            )
        )
    return tuple(found)


def _thin(count: int, most: int) -> Int[np.ndarray, "_"]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
