"""From demonstrations and a tokenizer to a policy that acts."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from actok.backbones.decoder import DecoderBackbone
from actok.core import (
    ActionSpace,
    ActionTokenizer,
    ConfigError,
    DataError,
    SpaceMismatchError,
    build_config,
    find_preset,
    merge_settings,
    split_settings,
    tokenizer_presets,
)
from actok.core.registry import load_target, suggest
from actok.policies.base import Policy
from actok.policies.load import load_policy, policy_integrity
from actok.policies.presets import find_policy_preset
from actok.policies.prompt import StateRange, prompts
from actok.policies.tiny import TinyConfig, TinyVLM
from actok.policies.token_head import TokenHead
from actok.policies.vla import VLA, VLAConfig
from actok.training.fitting import fit, load
from actok.training.policy_data import PolicyData
from actok.training.policy_stages import check_nothing_stays_random, policy_train_config
from actok.training.policy_trainer import PolicyTrainer
from actok.training.run_folder import RunFolder, check_run

# Of the state's numbers, what a policy takes as their range.
LOW, HIGH = 0.01, 0.99

__all__ = ["policy_tokenizer", "train_policy"]


def train_policy(
    data: Any,
    tokenizer: ActionTokenizer | str | Path | None = None,
    *,
    init: str | Path | None = None,
    preset: str = "actok-vla-tiny",
    horizon: int | None = None,
    views: Sequence[str] = (),
    space: str | Path | ActionSpace | None = None,
    rate_hz: float | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Policy:
    """Train a policy by imitation of demonstrations, through the codes of a frozen tokenizer or beside them.

    Episodes are split 80/10/10 by `seed`, as `fit` splits them; every step of a training episode is a sample. The last weights
    are kept (or their moving average, `weight_ema`): losses on the validation episodes are told, and choose nothing.

    Args:
        data: what `fit` takes, with episodes; of one robot.
        tokenizer: fitted, or the folder or Hub id of a saved one; it becomes part of the policy as it is. None with `init`.
        init: folder or Hub id of a saved policy, whose training goes on with its weights on these data. Tokenizer, backbone,
            settings, horizon, views and the range of the state are its own and cannot be given; `preset` and `training`
            say how.
        preset: a policy of `actok list policies`; with `init` its training alone counts.
        horizon: T of the chunks; None: the tokenizer's.
        views: cameras to look through, by name or by the last part of it; (): the policy reads the state only.
        space: action space, where the data do not tell.
        rate_hz: resample the data to this rate first; None: they are of the tokenizer's.
        seed: of the split. (Initial weights and batches have theirs in `training`.)
        settings: fields of `actok.policies.vla.VLAConfig` over the preset's; "backbone" is a table of the small backbone's
            fields over the preset's, or the Hub id or folder of another one.
        training: fields of `actok.training.policy_stages.PolicyTrainConfig` over the preset's.
        run: folder for log and checkpoints; None: nothing but the result is kept.
        resume: go on where the run in that folder stands, with the same data and settings.
        progress: tell on stderr.

    Returns the policy in evaluation mode, on the device it was trained on; its `meta` says what it was trained on.

    Raises:
        ConfigError: unknown preset or setting, stages that leave something new untrained. SpaceMismatchError, DataError: the
        data are not the tokenizer's (or not those of the policy of `init`), or would leave the policy blind
        (`PolicyData.build`). ArtifactError: `init` is no whole policy. TrainingError: training broke down. TrainingStopped, a
        KeyboardInterrupt: SIGTERM or Ctrl-C; the step is finished and, with a run folder, saved.
    """
    if resume and run is None:
        raise ConfigError("resume is asked for without a run folder; name it (run=, --run)")
    found = find_policy_preset(preset)
    trained = policy_train_config(found.training, training or {}, repr(preset))
    started, origin = None, {}
    if init is not None:
        _check_alone(tokenizer=tokenizer, horizon=horizon, views=tuple(views), settings=settings)
        started, origin = load_policy(init), {"name": Path(init).name, "integrity": policy_integrity(init)}
        backbone, config = started.meta.get("backbone", {}), started.config
        tokenizer, horizon, views = started.tokenizer, started.horizon, started.views
    else:
        backbone, config = _settings(preset, settings or {})
    if tokenizer is None:
        raise ConfigError("neither a tokenizer nor a policy to start from is given; name one (--tokenizer, or --init)")
    if run is not None:
        check_run(run, resume=resume)
    if not isinstance(tokenizer, ActionTokenizer):
        tokenizer = load(tokenizer)
    samples = PolicyData.build(
        data,
        tokenizer,
        horizon=horizon,
        views=views,
        seed=seed,
        space=space,
        rate_hz=rate_hz,
        text="subtask" if config.speaks else "none",
        after="subtask" if config.concludes else "none",
        anchored=config.state != "none",
        progress=progress,
    )
    if started is not None:
        policy = _going_on(started, samples, preset, origin)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(trained.seed)
            policy = _untrained(samples, backbone, config, preset)
        check_nothing_stays_random(policy, policy.heads, trained.stages)
    main = int(os.environ.get("RANK", "0")) == 0
    folder = None
    if run is not None:
        identity = {
            "policy": preset,
            "backbone": dict(backbone),
            "settings": asdict(config),
            "training": asdict(trained),
            "tokenizer": samples.tokenizer.weights_hash,
            "embodiment": samples.embodiment,
            "horizon": samples.horizon,
            "views": list(samples.views),
            "state": _short_hash(samples.proprio_statistics),
            "data": list(samples.origin),
            **({} if init is None else {"init": origin}),
        }
        folder = RunFolder(run, identity, resume=resume, main=main)
    trainer = PolicyTrainer(policy, samples, trained, folder=folder, progress=progress)
    resumed = trainer.resume()
    if trainer.report.progress:
        _announce(preset, trainer, resumed)
    summary = trainer.run()
    if folder is not None and main:
        folder.finish(summary)
    return policy.with_meta({"training": summary})


def policy_tokenizer(
    name: str,
    data: Any,
    *,
    horizon: int | None = None,
    space: str | Path | ActionSpace | None = None,
    rate_hz: float | None = None,
    seed: int = 0,
) -> ActionTokenizer:
    """A tokenizer for `train_policy`: a saved one by folder or Hub id, or a closed-form preset fitted on the same episodes.

    `name` may carry settings, as in "fast:scale=20". Raises ConfigError for a learned preset, with the command that trains it,
    and for a name that is neither preset nor folder.
    """
    if Path(name).is_dir() or "/" in name:
        return load(name)
    preset, settings = split_settings(name)
    if preset not in tokenizer_presets():
        raise ConfigError(
            f"{name!r} is neither a folder here nor a tokenizer of `actok list`; {suggest(preset, list(tokenizer_presets()))}"
        )
    if load_target(find_preset(preset).target).learned:
        told = str(data[0] if isinstance(data, (list, tuple)) and data else data)
        raise ConfigError(
            f"{preset} is a learned tokenizer and is trained first: actok fit {preset} --data {told} --out TOKENIZER, then"
            " --tokenizer TOKENIZER"
        )
    return fit(preset, data, horizon=horizon, space=space, rate_hz=rate_hz, seed=seed, **settings)


# -- going on with one ------------------------------------------------------------------------------------------------


def _check_alone(**given: Any) -> None:
    """Raise ConfigError for what a policy to start from has already."""
    if twice := [name for name, value in given.items() if value is not None and value not in ((), {})]:
        raise ConfigError(
            f"{', '.join(twice)} cannot be given beside a policy to start from, which has its own; leave it out, or train"
            " another policy"
        )


def _going_on(policy: VLA, samples: PolicyData, preset: str, origin: Mapping[str, str]) -> VLA:
    """The saved policy before its first step on these data. Raises where they are not what it reads and does."""
    policy.check(samples.space, rate_hz=samples.space.rate_hz)
    if samples.embodiment != policy.embodiment:
        raise SpaceMismatchError(
            f"the policy acts as {policy.embodiment!r}, the data are of {samples.embodiment!r}; give data of its robot"
        )
    if policy.state is not None and samples.proprio != policy.proprio:
        raise DataError(
            f"the policy reads a state of {policy.proprio} numbers, the data have {samples.proprio or 'none'}; give data with"
            " the state that it was trained on, or train a policy on these"
        )
    if samples.views != policy.views:
        raise DataError(
            f"the policy looks through {', '.join(policy.views)}, which these data call {', '.join(samples.views)}; rename"
            " the views of the data"
        )
    # Seed of the split of every dataset that it has ever been trained on.
    before = dict(policy.meta.get("split_seeds", {}))
    before |= {facts["name"]: facts["split"]["seed"] for facts in policy.meta.get("data", [])}
    for facts in samples.origin:
        if (seed := before.get(facts["name"], facts["split"]["seed"])) != facts["split"]["seed"]:
            raise DataError(
                f"the policy was trained on episodes of {facts['name']!r} as seed {seed} splits them, and seed"
                f" {facts['split']['seed']} would hold some of them out; give --seed {seed}"
            )
    lengths = samples.train.token_lengths
    passes = _passes(policy, lengths)
    return policy.with_meta(
        {
            "preset": preset,
            "data": list(samples.origin),
            "image_sizes": samples.image_sizes,
            "task_steps": {**policy.meta.get("task_steps", {}), **samples.task_steps},
            "tokens": {"mean": float(lengths.mean()), "most": int(lengths.max())},
            **({} if passes is None else {"passes": passes}),
            "started_from": origin,
            "split_seeds": before,
        }
    )


# -- making one -------------------------------------------------------------------------------------------------------


def _settings(preset: str, settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], VLAConfig]:
    """The backbone's table, and the policy's config; whatever can be refused is, before any data are read."""
    found = find_policy_preset(preset)
    given = settings.get("backbone", {})
    if isinstance(given, (str, Path)):
        backbone: dict[str, Any] = {"model": str(given)}
    elif isinstance(given, Mapping):
        backbone = merge_settings(found.backbone, given)
    else:
        raise ConfigError(f"backbone is {given!r}; give a table of its settings, or a Hub id or folder")
    if backbone.get("kind") == "tiny":
        build_config(TinyConfig, {k: v for k, v in backbone.items() if k != "kind"}, "the small backbone")
    elif set(backbone) != {"model"}:
        raise ConfigError(
            f"backbone is {backbone}; give kind = tiny and its settings, or model = a Hub id or folder alone"
        )
    rest = {key: value for key, value in settings.items() if key != "backbone"}
    config: VLAConfig = build_config(VLAConfig, merge_settings(found.policy, rest), f"policy {preset!r}")
    return backbone, config


def _untrained(samples: PolicyData, backbone: Mapping[str, Any], config: VLAConfig, preset: str) -> VLA:
    """The policy before its first step, with what a reader wants to know of its data."""
    state = None
    if config.state != "none" and (statistics := samples.proprio_statistics) is not None:
        state = StateRange(low=statistics.quantile(LOW), high=statistics.quantile(HIGH))
    if config.state != "none" and state is None:
        raise DataError(
            f"the policy reads a state (state={config.state}), which the data do not have; set state=none (--set state=none)"
        )
    lengths = samples.train.token_lengths
    policy = VLA.create(
        _backbone(samples, backbone, config, state),
        samples.tokenizer,
        config,
        embodiment=samples.embodiment,
        horizon=samples.horizon,
        views=samples.views,
        state=state,
        meta={
            "preset": preset,
            "backbone": dict(backbone),
            "data": list(samples.origin),
            "task_steps": dict(samples.task_steps),
            "image_sizes": samples.image_sizes,
            "tokens": {"mean": float(lengths.mean()), "most": int(lengths.max())},
        },
    )
    passes = _passes(policy, lengths)
    return policy if passes is None else policy.with_meta({"passes": passes})


def _backbone(
    samples: PolicyData, table: Mapping[str, Any], config: VLAConfig, state: StateRange | None
) -> DecoderBackbone:
    if table.get("kind") == "tiny":
        sizes = build_config(TinyConfig, {k: v for k, v in table.items() if k != "kind"}, "the small backbone")
        shown = state if config.state == "text" else None
        middle = None if shown is None else np.tile((shown.low + shown.high) / 2, (len(samples.instructions), 1))
        texts = prompts(samples.instructions, middle, shown, config.state_bins)
        return TinyVLM.create(sizes, [*texts, *samples.said], samples.views)
    from actok.backbones.policy_models import load_backbone

    # Each process of several loads it to its own GPU.
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return load_backbone(table["model"], device=device, dtype=torch.float32)


def _passes(policy: VLA, lengths: np.ndarray) -> float | None:
    """Mean number of passes that emit the codes of a training chunk, None where no head emits codes."""
    head = dict(policy.parts.items()).get("tokens")
    if not isinstance(head, TokenHead):
        return None
    # The constraint knows when a sequence of varying length is complete: no pass emits an end.
    return float(np.searchsorted(head.plan.edges, lengths, side="left").mean())


def _short_hash(statistics: Any) -> str | None:
    if statistics is None:
        return None
    return hashlib.sha256(json.dumps(statistics.to_dict()).encode()).hexdigest()[:16]


def _announce(preset: str, trainer: PolicyTrainer, resumed: bool) -> None:
    """What is about to be trained, in a few lines on stderr."""
    config, data = trainer.config, trainer.data
    for facts in data.origin:
        tqdm.write(
            f"{facts['name']}: {facts['frames']:,} samples of {facts['train_episodes']} training episodes", sys.stderr
        )
    sees = [*(f"view {view}" for view in data.views), *([f"a state of {data.proprio}"] if data.proprio else [])]
    tqdm.write(
        f"{preset}: {trainer.parameters:,} parameters on {trainer.accelerator.device}; sees {', '.join(sees)}; chunks of"
        f" {data.horizon} steps as {trainer.policy.meta['tokens']['mean']:.1f} tokens; {config.steps:,} steps of"
        f" {config.batch_size} samples, {config.steps * config.batch_size / len(data):.1f} epochs",
        sys.stderr,
    )
    for number, (stage, start) in enumerate(zip(config.stages, config.starts, strict=False), 1):
        tqdm.write(f"stage {number} from step {start + 1}: trains {', '.join(stage.train)}", sys.stderr)
    if trainer.folder is not None:
        told = f"going on after step {trainer.done}" if resumed else "new"
        tqdm.write(f"run folder {trainer.folder.path} ({told})", sys.stderr)
