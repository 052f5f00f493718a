"""actok encode and actok decode"""

from __future__ import annotations

import argparse
import sys

__all__ = ["run"]

BATCH = 4096


def run(args: argparse.Namespace) -> int:
    """Dispatch on the verb."""
    return _encode(args) if args.verb == "encode" else _decode(args)


def _encode(args: argparse.Namespace) -> int:
    import numpy as np
    from tqdm import tqdm

    from actok.core import ChunkContext, ConfigError
    from actok.data import Chunks, FrameCache, TokenTable, open_dataset, write_tokens
    from actok.training import load

    tokenizer = load(args.tokenizer)
    dataset = open_dataset(args.data, space=args.space)
    embodiment = tokenizer.embodiment_for(dataset.space)
    stride = tokenizer.horizon if args.stride is None else args.stride
    if stride < 1:
        raise ConfigError(f"--stride is {stride}; give at least 1 step")
    cache = FrameCache.build(dataset, rate_hz=args.rate)
    fitted_hz, given_hz = tokenizer.spaces[embodiment].rate_hz, cache.space.rate_hz
    if None not in (fitted_hz, given_hz) and fitted_hz != given_hz:
        print(
            f"actok: warning: {dataset.name} is at {given_hz:g} Hz, {embodiment} was fitted at {fitted_hz:g} Hz, so a chunk"
            f" lasts another time; resample with --rate {fitted_hz:g}",
            file=sys.stderr,
        )
    chunks = Chunks(cache, tokenizer.horizon, stride=stride)
    ids, lengths, columns, anchors = [], [], [], []
    for first in tqdm(range(0, len(chunks), BATCH), "encode", unit="batch", delay=2, disable=None):
        batch = chunks.batch(np.arange(first, min(first + BATCH, len(chunks))))
        context = ChunkContext(embodiment=embodiment, pad_mask=batch.pad_mask, anchor=batch.anchor)
        tokens = tokenizer.encode(batch.actions, context)
        ids.append(tokens.flat)
        lengths.append(tokens.lengths)
        anchors.append(batch.anchor)
        real = (~batch.pad_mask).sum(1)
        columns.append(np.stack([batch.episode, batch.start, real, tokens.out_of_range, tokens.saturated]))
    episode, start, real_steps, out_of_range, saturated = np.concatenate(columns, axis=1)
    sizes = np.concatenate(lengths)
    table = TokenTable(
        ids=np.concatenate(ids),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        episode=episode,
        start=start,
        real_steps=real_steps,
        out_of_range=out_of_range,
        saturated=saturated,
        tokenizer_hash=tokenizer.weights_hash,
        horizon=tokenizer.horizon,
        embodiment=embodiment,
        dataset=dataset.name,
        anchor=np.concatenate([a for a in anchors if a is not None]) if anchors[0] is not None else None,
    )
    write_tokens(table, args.out)
    values = int(real_steps.sum()) * dataset.space.dim
    print(
        f"{len(sizes)} chunks, {sizes.sum()} tokens ({sizes.mean():.1f} a chunk) written to {args.out}; "
        f"{out_of_range.sum()} of {values} values out of range, {saturated.sum()} saturated"
    )
    return 0


def _decode(args: argparse.Namespace) -> int:
    import numpy as np
    from tqdm import tqdm

    from actok.core import ArtifactError, ChunkContext
    from actok.data import read_tokens, write_npz
    from actok.training import load

    tokenizer = load(args.tokenizer)
    table = read_tokens(args.tokens)
    if table.tokenizer_hash != tokenizer.weights_hash:
        raise ArtifactError(
            f"{args.tokens} was made by the tokenizer {table.tokenizer_hash[:12]}, {args.tokenizer} is"
            f" {tokenizer.weights_hash[:12]}; decode with the one that encoded"
        )
    count = len(table.offsets) - 1
    actions, valid, repaired = [], [], []
    reason = None
    for first in tqdm(range(0, count, BATCH), "decode", unit="batch", delay=2, disable=None):
        last = min(first + BATCH, count)
        rows = [table.ids[table.offsets[b] : table.offsets[b + 1]] for b in range(first, last)]
        anchor = None if table.anchor is None else table.anchor[first:last]
        context = ChunkContext(embodiment=table.embodiment, horizon=table.horizon, anchor=anchor)
        out = tokenizer.decode(rows, context, repair=args.repair)
        actions.append(out.actions)
        valid.append(out.valid)
        repaired.append(out.repaired)
        reason = reason or next((r for r in out.reasons if r), None)
    good, mended = np.concatenate(valid), np.concatenate(repaired)
    write_npz(
        args.out,
        actions=np.concatenate(actions),
        valid=good,
        repaired=mended,
        episode=table.episode,
        start=table.start,
        real_steps=table.real_steps,
    )
    print(f"{count} chunks of {table.horizon} steps written to {args.out}; {int((~good).sum())} did not decode")
    if not good.all():
        state = f"{int(mended.sum())} were repaired" if mended.any() else "their actions are NaN"
        print(f"actok: warning: {int((~good).sum())} sequences are invalid ({reason}); {state}", file=sys.stderr)
        return 3
    return 0
