"""Where the time of a policy's call goes: the stages of FASTer's table 2 (arXiv 2512.04952), one observation at a time.

    python benchmarks/policy_latency.py --policies bins=DIR fast=DIR --data DATA [--views 2] [--pixels 64] [--calls 40]
    python benchmarks/policy_latency.py --paligemma [--device cuda] [--calls 40]

Stages, in milliseconds (median, 95th percentile):

    images    prompt and image encoders
    prefix    the backbone's pass over the observation
    actions   the passes that emit codes, or integrate the flow; `pass`: one of them
    decode    codes to actions, by the tokenizer

`--policies`: trained small policies (`actok train-policy`), as NAME=FOLDER, on observations of DATA, on one thread. Each is
timed as it is, without images, and its untrained twin of the same tokenizer and settings with `--views` images of noise.
A policy's weights change no speed but where sequences end by themselves: there the twin's calls are timed, and its total is
put together from its stages with as many passes as the trained policy makes.

`--paligemma`: PaliGemma's size (3 B parameters) with random weights, at the paper's setting of one arm: 7 dimensions, chunks
of 20 steps, two views, 21 codes of FASTerVQ; token-wise and in blocks of 7, with and without an action expert. In bf16, as a
rollout on a GPU acts with it (`Policy.with_precision`). On a GPU; a CPU takes minutes and 12 GB, and is refused without --force.

Prints JSON, or writes it to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actok.core import ActionGroup, ActionSpace, ConfigError, DataError, FitPart, build_config, find_preset
from actok.core.files import write_bytes
from actok.core.provenance import circumstances
from actok.core.registry import load_target
from actok.data import open_dataset
from actok.policies.base import PolicyObservation
from actok.policies.load import load_policy
from actok.policies.prompt import StateRange, prompts
from actok.policies.tiny import TinyConfig, TinyVLM
from actok.policies.vla import VLA, VLAConfig

WARM_UP = 3
STAGES = ("images", "prefix", "actions", "decode", "total")
# Of the paper's single arm.
ARM = ActionSpace(
    embodiment="arm",
    dim=7,
    groups=(
        ActionGroup(name="position", kind="position", dims=(0, 1, 2), mode="delta"),
        ActionGroup(name="rotation", kind="rotation", dims=(3, 4, 5), rotation="axis_angle", mode="delta"),
        ActionGroup(name="gripper", kind="gripper", dims=(6,)),
    ),
    rate_hz=20.0,
)
HORIZON, VIEWS, PIXELS, PROPRIO = 20, 2, 224, 8
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "token-wise": {"block": 1},
    "block-wise": {},
    "token-wise, expert": {"block": 1, "token_expert": 1024},
    "block-wise, expert": {"token_expert": 1024},
}


# -- timing -----------------------------------------------------------------------------------------------------------


def timed(policy: VLA, observations: Sequence[PolicyObservation], head: str, calls: int) -> dict[str, Any]:
    """Milliseconds by stage, and forward passes, of so many calls after some that warm up."""
    _synchronised(policy)
    rows, passes = [], []
    for number in range(-WARM_UP, calls):
        observation = observations[number % len(observations)]
        generator = torch.Generator(_device(policy)).manual_seed(number + WARM_UP)
        begin = time.perf_counter()
        acted = policy.act(observation, head=head, generator=generator)
        total = time.perf_counter() - begin
        if number >= 0:
            rows.append({**acted.seconds, "total": total})
            passes.append(acted.passes)
    stages = {name: 1e3 * np.array([row[name] for row in rows]) for name in STAGES}
    each = stages["actions"] / np.array(passes)
    return {
        "calls": calls,
        "passes": float(np.mean(passes)),
        "ms": {name: _quantiles(values) for name, values in {**stages, "pass": each}.items()},
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {"p50": float(np.median(values)), "p95": float(np.quantile(values, 0.95))}


def _device(policy: VLA) -> torch.device:
    return next(policy.parameters()).device


def _synchronised(policy: VLA) -> None:
    """Let a stage on a GPU end where its work does, not where it was handed over."""
    if _device(policy).type != "cuda":
        return

    def waiting(stage: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found = stage(*args)
            torch.cuda.synchronize()
            return found

        return run

    for name in ("_look", "_see"):
        setattr(policy, name, waiting(getattr(policy, name)))


# -- small policies ---------------------------------------------------------------------------------------------------


def observed(data: str, count: int, seed: int = 0) -> list[PolicyObservation]:
    """Random frames of a data set as observations without images."""
    dataset = open_dataset(data)
    rng = np.random.default_rng(seed)
    found = []
    for index in rng.choice(len(dataset), size=min(count, len(dataset)), replace=False):
        episode = dataset.episode(int(index))
        if episode.proprio is None:
            raise DataError(f"{data} holds no proprioception; give the data that the policies were trained on")
        t = int(rng.integers(len(episode.actions)))
        proprio = np.asarray(episode.proprio[t : t + 1], np.float32)
        found.append(PolicyObservation(instruction=[episode.instruction], proprio=proprio))
    return found


def with_noise(observation: PolicyObservation, views: Sequence[str], pixels: int, seed: int) -> PolicyObservation:
    """The same with images of noise."""
    rng = np.random.default_rng(seed)
    images = {view: rng.integers(0, 256, (1, pixels, pixels, 3), np.uint8) for view in views}
    return PolicyObservation(instruction=observation.instruction, proprio=observation.proprio, images=images)


def twin(policy: VLA, views: tuple[str, ...], observations: Sequence[PolicyObservation]) -> VLA:
    """The policy untrained, with eyes."""
    table = {k: v for k, v in policy.meta["backbone"].items() if k != "kind"}
    shown = policy.state if policy.config.state == "text" else None
    texts = [text for o in observations for text in prompts(o.instruction, o.proprio, shown, policy.config.state_bins)]
    backbone = TinyVLM.create(build_config(TinyConfig, table, "the small backbone"), texts, views)
    made = VLA.create(
        backbone,
        policy.tokenizer,
        policy.config,
        embodiment=policy.embodiment,
        horizon=policy.horizon,
        views=views,
        state=policy.state,
    )
    return made.eval()


def small(named: Sequence[str], data: str, *, views: int, pixels: int, calls: int) -> list[dict[str, Any]]:
    """Every policy with each of its heads, without images and with them."""
    names = tuple(f"view{v}" for v in range(views))
    observations = observed(data, calls)
    found = []
    for text in named:
        name, equals, folder = text.partition("=")
        if not equals:
            raise ConfigError(f"policy {text!r} has no name; give NAME=FOLDER")
        policy = load_policy(folder)
        if not isinstance(policy, VLA) or policy.views:
            raise ConfigError(f"{folder} is no policy that reads the state alone; give one trained without --views")
        torch.manual_seed(0)
        seeing = twin(policy, names, observations)
        shown = [with_noise(o, names, pixels, seed) for seed, o in enumerate(observations)]
        for head in policy.heads:
            own, eyes = timed(policy, observations, head, calls), timed(seeing, shown, head, calls)
            row = {"policy": name, "head": head, "block": policy.config.block, "expert": policy.config.token_expert}
            found.append({**row, "views": 0, **own, "composed": False})
            composed = own["passes"] != eyes["passes"]
            if composed:
                ms = {k: v["p50"] for k, v in eyes["ms"].items()}
                total = ms["images"] + ms["prefix"] + own["passes"] * ms["pass"] + ms["decode"]
                eyes = {**eyes, "passes": own["passes"]}
                eyes["ms"] = {**eyes["ms"], "total": {"p50": total, "p95": None}, "actions": {"p50": None, "p95": None}}
            found.append({**row, "views": views, **eyes, "composed": composed})
    return found


# -- PaliGemma's size -------------------------------------------------------------------------------------------------


def paligemma(device: str, sizes: Mapping[str, Any] | None = None) -> Any:
    """PaliGemma-3B at 224 pixels with random weights and a text tokenizer of words and digits.

    `sizes`: other fields of its config, for a trial.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from actok.backbones.policy_models import backbone_from_spec

    special = ["<pad>", "<eos>", "<bos>", "<image>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *map(str, range(10))])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    text = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=special[:4],
    )
    config = {
        "model_type": "paligemma",
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "image_token_index": vocabulary["<image>"],
        "projection_dim": 2048,
        "hidden_size": 2048,
        "text_config": {
            "model_type": "gemma",
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 257216,
            "rope_theta": 10000.0,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": PIXELS,
            "patch_size": 14,
            "projection_dim": 2048,
        },
        **(sizes or {}),
    }
    preprocessor = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": dict.fromkeys(("height", "width"), config["vision_config"]["image_size"]),
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "additional_special_tokens": special[:4],
    }
    files = {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        "tokenizer.json": json.loads(text.backend_tokenizer.to_str()),
        "tokenizer_config.json": settings,
    }
    spec = {"kind": "transformers", "model_type": "paligemma", "name": "PaliGemma, random", "dtype": "float32"}
    with torch.device(device):
        return backbone_from_spec(spec, {name: json.dumps(content).encode() for name, content in files.items()})


def large(device: str, calls: int, sizes: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The paper's single arm, untrained."""
    rng = np.random.default_rng(0)
    chunks = np.cumsum(0.02 * rng.standard_normal((256, HORIZON, ARM.dim)), axis=1).astype(np.float32)
    preset = find_preset("fastervq")
    target = load_target(preset.target)
    tokenizer = target.prepare(
        [FitPart(actions=chunks, space=ARM)], build_config(target.config_class, preset.settings, preset.name)
    )
    state = StateRange(low=-np.ones(PROPRIO, np.float32), high=np.ones(PROPRIO, np.float32))
    views = tuple(f"view{v}" for v in range(VIEWS))
    observations = []
    for number in range(8):
        proprio = rng.uniform(-1, 1, (1, PROPRIO)).astype(np.float32)
        seen = PolicyObservation(instruction=["put the red block on the left shelf"], proprio=proprio)
        observations.append(with_noise(seen, views, PIXELS, number))
    found = []
    for name, settings in SETTINGS.items():
        policy = VLA.create(
            paligemma(device, sizes), tokenizer, VLAConfig(**settings), horizon=HORIZON, views=views, state=state
        )
        policy = policy.with_precision("bf16").to(device).eval()
        row = {
            "policy": name,
            "head": "tokens",
            "block": policy.config.block,
            "expert": policy.config.token_expert,
            "parameters": sum(p.numel() for p in policy.parameters()),
            "precision": policy.precision,
            "views": VIEWS,
        }
        found.append({**row, **timed(policy, observations, "tokens", calls), "composed": False})
        del policy
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=(), metavar="NAME=FOLDER")
    parser.add_argument("--data", help="what the policies were trained on")
    parser.add_argument("--views", type=int, default=2, help="images of the twins with eyes (default: 2)")
    parser.add_argument("--pixels", type=int, default=64, help="side of an image (default: 64)")
    parser.add_argument("--calls", type=int, default=40, help="timed calls of each (default: 40)")
    parser.add_argument("--paligemma", action="store_true", help="PaliGemma's size with random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of --paligemma")
    parser.add_argument("--force", action="store_true", help="--paligemma on a CPU too")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    args = parser.parse_args()
    if bool(args.policies) == args.paligemma:
        parser.error("give --policies with --data, or --paligemma")
    if args.policies and not args.data:
        parser.error("give --data, where the observations come from")
    if args.paligemma and args.device == "cpu" and not args.force:
        print(
            "policy_latency: no GPU: PaliGemma's size takes 12 GB and minutes a call here; --force does it",
            file=sys.stderr,
        )
        return 1
    torch.set_num_threads(1)
    if args.paligemma:
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
        rows = large(args.device, args.calls)
    else:
        device = "cpu"
        rows = small(args.policies, args.data, views=args.views, pixels=args.pixels, calls=args.calls)
    conditions = circumstances(("torch", "numpy", "transformers"))
    text = json.dumps({"conditions": conditions, "device": device, "threads": 1, "rows": rows}, indent=1) + "\n"
    if args.out:
        write_bytes(args.out, text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ConfigError, DataError) as error:
        sys.exit(f"policy_latency: {error}")
