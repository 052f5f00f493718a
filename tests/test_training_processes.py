"""Training as it is started: the command line, signals, several processes, trackers; each in processes of its own."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import actok
from training_codec import episodes

TINY = ["--set", "hidden=16", "latent_dim=8", "quantizer.codes=13", "quantizer.levels=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of episodes."""
    folder = tmp_path_factory.mktemp("data")
    found = episodes(60)
    np.savez(folder / "moves.npz", action=np.concatenate(found), episode_length=[len(e) for e in found])
    return folder / "moves.npz"


def command(data, out, *more: str) -> list[str]:
    arguments = ["fit", "vqbet-tiny", "--data", str(data), "--horizon", "7", "--out", str(out), "--batch-size", "24"]
    return ["-m", "actok", *arguments, *TINY, *more]


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process: subprocess.Popen) -> str:
    """What it wrote to stderr. Where it does not end, it is told to, which ends the processes that it started too."""
    try:
        return process.communicate(timeout=240)[1]
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=40)


def test_sigterm_saves_and_resume_goes_on_to_the_same_end(data, tmp_path):
    out, run = tmp_path / "tok", tmp_path / "tok-run"
    steps = ["--steps", "300", "--train", "log_every=10", "eval_every=100", "--lr", "0.002"]
    process = start(command(data, out, *steps, "--track", "tensorboard"))
    before = time.monotonic()
    while not (run / "log.jsonl").exists() and time.monotonic() - before < 120:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    errors = end_of(process)
    assert process.returncode == 130, errors
    last = errors.strip().splitlines()[-1]
    stopped = lines(run)[-1]["step"]
    assert 10 <= stopped < 300
    assert last == (
        f"actok: interrupted: stopped after step {stopped} of 300, saved in {run}; the same command with --resume goes on"
    )
    assert not out.exists()
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{stopped:09d}"]
    assert list((run / "tracks").glob("events.out.tfevents.*"))

    done = subprocess.run(
        [sys.executable, *command(data, out, *steps, "--resume")], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert f"going on after step {stopped}" in done.stderr
    assert "step 300 of 300: loss" in done.stderr
    assert "validation episodes: l1" in done.stdout
    assert f"actok inspect {out}" in done.stdout
    whole = actok.fit(
        "vqbet-tiny",
        str(data),
        horizon=7,
        training={"steps": 300, "eval_every": 100, "learning_rate": 0.002, "batch_size": 24},
        progress=False,
        hidden=16,
        latent_dim=8,
        quantizer={"codes": 13, "levels": 2},
    )
    assert actok.load(out).weights_hash == whole.weights_hash


SETTINGS = {"horizon": 7, "progress": False, "hidden": 16, "latent_dim": 8, "quantizer": {"codes": 13, "levels": 2}}
TRAINING = {
    "steps": 20,
    "quantise_after": 3,
    "batch_size": 24,
    "eval_every": 10,
    "log_every": 5,
    "checkpoint_every": 10,
}
# Each process trains and notes what it got; then it trains again, and the second process dies in step 8.
RANKS = f"""
import json, os, signal, sys, torch
import actok
from actok.training.engine import Trainer

torch.set_num_threads(1)
folder, data = sys.argv[1:]
tokenizer = actok.fit("vqbet-tiny", data, run=folder + "/two", training={TRAINING}, **{SETTINGS})
with open(folder + "/rank" + os.environ["RANK"], "w") as stream:
    json.dump([tokenizer.weights_hash, tokenizer.meta["training"]["processes"]], stream)

step = Trainer._step
def dies(self, number, batch):
    if number == 7 and os.environ["RANK"] == "1":
        os._exit(9)
    step(self, number, batch)
Trainer._step = dies
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the first process, which has something to say before
actok.fit("vqbet-tiny", data, run=folder + "/dead", training={TRAINING}, **{SETTINGS})
"""


def test_two_processes_end_with_the_same_weights_and_a_dead_one_ends_the_run(data, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start([*torchrun, str(script), str(tmp_path), str(data)])
    actok.fit("vqbet-tiny", str(data), run=tmp_path / "one", training=TRAINING, **SETTINGS)
    errors = end_of(process)
    ranks = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0][1] == 2
    found = {name: lines(tmp_path / name) for name in ("one", "two")}
    assert [line["step"] for line in found["two"]] == [line["step"] for line in found["one"]]
    # The same batches; only k-means begins at other rows.
    last = {name: [line["loss"] for line in found[name] if "loss" in line][-1] for name in found}
    assert last["two"] == pytest.approx(last["one"], rel=0.2)
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 2

    assert process.returncode != 0
    assert "another of the 2 processes of this run ended or hung in step 8" in errors
    assert "start all again with --resume" in errors
    assert [line["step"] for line in lines(tmp_path / "dead")] == [5]
