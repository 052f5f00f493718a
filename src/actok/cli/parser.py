"""The command line's surface. Only argparse is imported here, so that `actok --help` answers at once."""

from __future__ import annotations

import argparse

__all__ = ["build_parser"]

WORKERS_HELP = "processes (default: 2)"


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    from actok import __version__

    parser = argparse.ArgumentParser(
        prog="actok",
        description="Action tokenizers for vision-language-action models: fit, use, compare, replay in simulation.",
        epilog="Exit codes: 0 done, 1 error, 2 usage, 3 done but something in it failed, 130 interrupted. With the"
        " environment variable ACTOK_CACHE naming a folder, data are memory-mapped from there instead of held in memory.",
    )
    parser.add_argument("--version", action="version", version=f"actok {__version__}")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, summary: str, module: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".", parents=[debug])
        sub.set_defaults(module=module)
        return sub

    v = verb("list", "list tokenizers, action spaces, mixtures, policies or environments", "inspect")
    kinds = ("tokenizers", "spaces", "mixtures", "policies", "envs")
    v.add_argument("what", nargs="?", choices=kinds, default="tokenizers")
    v.add_argument("--json", action="store_true", help="machine-readable output")

    v = verb("collect", "record demonstrations of scripted experts in simulation", "simulate")
    v.add_argument("--env", default="metaworld", help="simulator (default: metaworld)")
    _env_options(v)
    v.add_argument("--out", required=True, metavar="DIR", help="LeRobot v3.0 folder to write; must be new or empty")
    v.add_argument("--tasks", default="all", help="comma-separated task names (default: all)")
    v.add_argument("--episodes", type=int, default=10, help="successful episodes wanted per task (default: 10)")
    v.add_argument("--images", type=int, metavar="PIXELS", help="also render three views of this size")
    v.add_argument("--workers", type=int, default=2, help=WORKERS_HELP)
    _seed(v, "of the start states")

    v = verb("teacher", "train a small vision-language teacher on a dataset's images and texts", "teacher")
    v.add_argument("--data", required=True, metavar="PATH", nargs="+", help="datasets with images, of any format")
    v.add_argument("--out", required=True, metavar="DIR", help="folder to save it in; must be new or empty")
    v.add_argument("--steps", type=int, metavar="N", help="training steps (default: 1500)")
    v.add_argument("--batch-size", type=int, metavar="N", help="frames of a step (default: 128)")
    v.add_argument("--size", type=int, metavar="PIXELS", help="side to which images are resized (default: 64)")
    v.add_argument("--views", metavar="A,B,C", help="views to use (default: the first three of each dataset)")
    _seed(v, "of the split, the initial weights and the batches")

    v = verb("fit", "fit or train a tokenizer on a dataset's training episodes", "fit")
    v.add_argument("name", metavar="NAME", help="a tokenizer of `actok list`")
    _data(v, many=True, more=", or one mixture (name or TOML)")
    v.add_argument("--out", required=True, metavar="DIR", help="folder to save the tokenizer in")
    _settings(v)
    _training(v)
    _rate(v)
    v.add_argument("--tolerance", metavar="TEXT", help='search the coarsest setting within e.g. "2 mm, 1 deg" (p99)')
    v.add_argument("--horizon", type=int, metavar="T", help="steps of a chunk (default: one second)")
    _seed(v, "of the split into training, validation and test episodes")

    v = verb("features", "encode every frame by a frozen foundation model, once", "features")
    _data(v, many=True, more=", or one mixture (name or TOML)")
    v.add_argument("--teacher", required=True, metavar="HUB_ID_OR_FOLDER", help="foundation model")
    v.add_argument(
        "--out", required=True, metavar="DIR", help="folder of features; each dataset gets one of its own in it"
    )
    _rate(v)
    v.add_argument("--layer", type=int, help="of its hidden states (default: the teacher's own choice)")
    v.add_argument("--views", metavar="A,B,...", help="cameras to show, or none (default: the dataset's first three)")
    v.add_argument("--stride", type=int, default=1, help="encode every K-th frame and changes of text (default: 1)")
    v.add_argument("--batch-size", type=int, default=32, help="frames or texts at a time (default: 32)")
    v.add_argument("--device", help="as torch names it (default: cuda where there is one, else cpu)")
    v.add_argument("--shard", default="1/1", metavar="I/N", help="make the I-th of N shares; the last one joins them")
    v.add_argument("--workers", type=int, default=1, help="processes here, each with a teacher of its own (default: 1)")

    v = verb("train-policy", "train a policy that acts through a tokenizer's codes, by imitation", "policy")
    v.add_argument(
        "--tokenizer",
        metavar="DIR_OR_NAME",
        help="saved tokenizer, or a closed-form one of `actok list` (with settings: fast:scale=20) to fit on these data",
    )
    v.add_argument(
        "--init",
        metavar="DIR",
        help="instead: go on from a saved policy (or Hub id), with its tokenizer, backbone, settings and views",
    )
    _data(v, many=True)
    _rate(v)
    v.add_argument("--out", required=True, metavar="DIR", help="folder to save the policy in")
    v.add_argument("--policy", default="actok-vla-tiny", metavar="NAME", help="preset (default: actok-vla-tiny)")
    v.add_argument("--backbone", metavar="HUB_ID_OR_FOLDER", help="vision-language model (default: the preset's)")
    v.add_argument("--views", metavar="A,B,...", help="cameras to look through (default: none, the state alone)")
    v.add_argument("--horizon", type=int, metavar="T", help="steps of a chunk (default: the tokenizer's)")
    _settings(v, "override settings: heads, block, spacing, state, vocabulary, token_expert, flow_expert, ... (vla.md)")
    _steps(
        v.add_argument_group("training", "Several processes: `torchrun --nproc_per_node N -m actok train-policy ...`.")
    )
    _seed(v, "of the split into training, validation and test episodes")

    v = verb("encode", "turn a dataset into tokens", "code")
    v.add_argument("tokenizer", metavar="DIR", help="saved tokenizer, or Hub id")
    _data(v, many=False)
    v.add_argument("--out", required=True, metavar="FILE", help="parquet file to write")
    _rate(v)
    v.add_argument("--stride", type=int, help="steps between chunk starts (default: the horizon, so chunks tile)")

    v = verb("decode", "turn a token file back into actions", "code")
    v.add_argument("tokenizer", metavar="DIR", help="saved tokenizer, or Hub id")
    v.add_argument("--tokens", required=True, metavar="FILE", help="parquet file of `actok encode`")
    v.add_argument("--out", required=True, metavar="FILE", help="npz file to write")
    v.add_argument(
        "--repair", metavar="MODE", help="repair undecodable sequences by this named mode (default: leave NaN)"
    )

    v = verb("export", "write a learned tokenizer as ONNX files: raw actions to ids, ids to raw actions", "export")
    v.add_argument("tokenizer", metavar="DIR", help="saved tokenizer, or Hub id")
    v.add_argument(
        "--out", required=True, metavar="FOLDER", help="writes encoder.onnx, decoder.onnx, export.json there"
    )
    v.add_argument("--embodiment", metavar="NAME", help="whose normaliser and limits (default: the tokenizer's first)")

    v = verb("inspect", "show what a saved tokenizer or policy is, or what a dataset holds", "inspect")
    v.add_argument("path", metavar="DIR", help="saved tokenizer or policy, Hub id, or dataset")
    v.add_argument("--space", metavar="NAME_OR_TOML", help="action space of a dataset")
    v.add_argument("--json", action="store_true", help="machine-readable output")

    v = verb("bench", "compare tokenizers on held-out episodes", "bench")
    _data(v, many=True)
    _tokenizers(v)
    v.add_argument("--out", required=True, metavar="DIR", help="writes results.json, table.md and report.html there")
    v.add_argument("--horizon", type=int, metavar="T", help="steps of a chunk (default: one second)")
    v.add_argument("--sweep", action="store_true", help="also every setting of each preset's sweep (rate-distortion)")
    v.add_argument("--replay", metavar="FILE", help="replay.json of `actok replay`, to show beside the errors")
    v.add_argument(
        "--semantics", action="store_true", help="also what the codes say about task, phase, verb and instruction"
    )
    v.add_argument(
        "--features", metavar="DIR", help="with --semantics: features of `actok features`, for retrieval by text"
    )
    v.add_argument("--fresh", action="store_true", help="do not reuse finished parts of an earlier run in DIR")
    _seed(v, "of the split and of every random test")

    v = verb("replay", "execute decoded demonstrations in simulation, open or closed loop", "simulate")
    _tokenizers(v)
    v.add_argument("--env", default="metaworld", help="simulator (default: metaworld)")
    _env_options(v)
    v.add_argument("--out", required=True, metavar="DIR", help="writes replay.json or closed_loop.json there")
    v.add_argument("--data", metavar="PATH", help="demonstrations with start states (default: collect them into DIR)")
    v.add_argument("--episodes", type=int, default=5, help="test episodes per task (default: 5)")
    v.add_argument("--horizon", type=int, metavar="T", help="steps of a chunk (default: one second)")
    v.add_argument("--workers", type=int, default=2, help=WORKERS_HELP)
    v.add_argument(
        "--closed-loop",
        action="store_true",
        help="at each chunk the scripted expert's next actions from where the robot is, not the demonstration's",
    )
    _seed(v, "of the split")

    v = verb("rollout", "let a trained policy act in simulation and count what it solves", "rollout")
    v.add_argument("--policy", required=True, metavar="DIR", help="folder of `actok train-policy`, or Hub id")
    v.add_argument(
        "--env",
        required=True,
        metavar="NAME[/TASK,...]",
        help="simulator and tasks, NAME/all for all of them (default: the tasks of the policy's training data)",
    )
    _env_options(v)
    v.add_argument("--out", required=True, metavar="DIR", help="writes rollout.json, rollout.html and recordings there")
    v.add_argument("--episodes", type=int, default=10, help="episodes per task (default: 10)")
    v.add_argument("--head", metavar="NAME", help="which head acts, e.g. tokens or flow (default: the policy's first)")
    v.add_argument("--execute", type=int, metavar="K", help="steps of each chunk to execute (default: the whole chunk)")
    v.add_argument(
        "--ensemble",
        type=float,
        metavar="X",
        help="temporal ensembling: a chunk at every step, averaged with weights exp(-X i), i = 0 the oldest (ACT: 0.01)",
    )
    v.add_argument(
        "--limit",
        type=float,
        default=1.5,
        metavar="X",
        help="steps, in lengths of a demonstration; inf: the simulator's own limit (default: 1.5)",
    )
    v.add_argument(
        "--deadline",
        type=float,
        metavar="MS",
        help="of a call: emit codes until the first prefix that decodes after it (tokenizers with prefixes, e.g. oat)",
    )
    _settings(v, "how the policy draws its actions: temperature, top_k (0: all), flow_steps (default: as saved)")
    v.add_argument("--images", type=int, metavar="PIXELS", help="side of the policy's views (default: as in training)")
    v.add_argument(
        "--cameras",
        metavar="VIEW=CAMERA",
        nargs="+",
        action="extend",
        default=[],
        help="which of the simulator's views shows what the policy calls VIEW (default: the one of the same name)",
    )
    v.add_argument("--batch", type=int, default=16, metavar="N", help="episodes at a time (default: 16)")
    v.add_argument("--device", help="as torch names it (default: cuda where there is one, else cpu)")
    v.add_argument(
        "--precision",
        choices=("float32", "bf16"),
        help="in which the policy computes (default: on cpu float32, elsewhere that of its training)",
    )
    v.add_argument("--workers", type=int, default=2, help=WORKERS_HELP)
    v.add_argument(
        "--record", type=int, metavar="N", help="episodes to film (default: 2 where the simulator has cameras)"
    )
    _seed(v, "of start states and draws")

    v = verb("demo", "collect, fit, compare, replay, report, and a policy that acts, in one go", "demo")
    v.add_argument("--data", metavar="PATH", help="own dataset or Hub id instead of collecting (no replay, no policy)")
    v.add_argument("--space", metavar="NAME_OR_TOML", help="action space of the data, where they do not tell")
    v.add_argument("--out", default="runs/demo", metavar="DIR", help="default: runs/demo")
    v.add_argument("--workers", type=int, default=2, help=WORKERS_HELP)
    _seed(v, "of everything")
    return parser


def _data(v: argparse.ArgumentParser, *, many: bool, more: str = "") -> None:
    v.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        nargs="+" if many else None,
        help="LeRobot, RLDS, HDF5 or npz folder or file, or Hub id" + ("; several allowed" if many else "") + more,
    )
    v.add_argument("--space", metavar="NAME_OR_TOML", help="action space of the data, where they do not tell")


def _rate(v: argparse.ArgumentParser) -> None:
    v.add_argument(
        "--rate", type=float, metavar="HZ", help="resample the data to this rate first (default: as they are)"
    )


def _env_options(v: argparse.ArgumentParser) -> None:
    v.add_argument(
        "--env-set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="options of the simulator, e.g. suites=libero_90",
    )


def _settings(v: argparse.ArgumentParser, what: str = "override settings") -> None:
    v.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help=what)


def _training(v: argparse.ArgumentParser) -> None:
    group = v.add_argument_group(
        "learned tokenizers", "Started by `torchrun --nproc_per_node N -m actok fit ...` they train in N processes."
    )
    group.add_argument("--features", metavar="DIR", help="folder of `actok features`: train on semantic objectives too")
    group.add_argument(
        "--align",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override semantic objectives, e.g. prediction=0",
    )
    _steps(group)


def _steps(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", type=int, metavar="N", help="training steps (default: the preset's)")
    group.add_argument("--batch-size", type=int, metavar="N", help="samples of a step, of all processes together")
    group.add_argument("--lr", type=float, metavar="X", help="peak learning rate")
    group.add_argument(
        "--train", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="override training settings"
    )
    group.add_argument("--run", metavar="DIR", help="folder of log and checkpoints (default: that of --out, with -run)")
    group.add_argument("--resume", action="store_true", help="go on where the run in that folder stands")
    group.add_argument(
        "--track", metavar="NAME", nargs="+", default=[], help="log to these trackers too, e.g. tensorboard"
    )


def _tokenizers(v: argparse.ArgumentParser) -> None:
    v.add_argument(
        "--tokenizers",
        required=True,
        metavar="NAME_OR_DIR,...",
        help="presets to fit (with settings: fast:scale=20:vocab=2048), or saved folders, comma-separated",
    )


def _seed(v: argparse.ArgumentParser, what: str) -> None:
    v.add_argument("--seed", type=int, default=0, help=f"{what} (default: 0)")
