"""Training as it is started: the command line, signals, several processes, trackers; each in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import actok
from training_codec import episodes

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
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
        start_new_session=True,
    )


def end_of(process: subprocess.Popen) -> str:
    """What it wrote to stderr; it and its children are killed where it does not end."""
    try:
        return process.communicate(timeout=90)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def test_sigterm_saves_and_resume_goes_on_to_the_same_end(data, tmp_path):
    out, run = tmp_path / "tok", tmp_path / "tok-run"
    steps = ["--steps", "200", "--train", "log_every=10", "eval_every=100", "--lr", "0.002"]
    process = start(command(data, out, *steps, "--track", "tensorboard"))
    before = time.monotonic()
    while not (run / "log.jsonl").exists() and time.monotonic() - before < 60:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    errors = end_of(process)
    assert process.returncode == 130, errors
    last = errors.strip().splitlines()[-1]
    stopped = lines(run)[-1]["step"]
    assert 10 <= stopped < 200
    assert last == (
        f"actok: interrupted: stopped after step {stopped} of 200, saved in {run}; the same command with --resume goes on"
    )
    assert not out.exists()
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{stopped:09d}"]
    assert list((run / "tracks").glob("events.out.tfevents.*"))

    done = subprocess.run(
        [sys.executable, *command(data, out, *steps, "--resume")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"going on after step {stopped}" in done.stderr
    assert "step 400 of 200: loss" in done.stderr
    assert "validation episodes: l1" in done.stdout
    assert f"actok inspect {out}" in done.stdout
    whole = actok.fit(
        "vqbet-tiny",
        str(data),
        horizon=7,
        training={"steps": 200, "eval_every": 100, "learning_rate": 0.002, "batch_size": 24},
        progress=False,
        hidden=16,
        latent_dim=8,
        quantizer={"codes": 13, "levels": 2},
    )
    assert actok.load(out).weights_hash == whole.weights_hash


RANKS = """
import json, os, sys, torch
import actok
torch.set_num_threads(1)
out, data, steps = sys.argv[1:]
tokenizer = actok.fit(
    "vqbet-tiny", data, horizon=7, run=out + "-run", progress=False, hidden=16, latent_dim=8,
    quantizer={"codes": 13, "levels": 2},
    training={"steps": int(steps), "batch_size": 24, "eval_every": 10, "log_every": 5, "checkpoint_every": 10},
)
with open(out + os.environ.get("RANK", "0"), "w") as stream:
    json.dump([tokenizer.weights_hash, tokenizer.meta["training"]["processes"]], stream)
"""


def test_two_processes_end_with_the_same_weights_and_the_first_writes(data, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    two = start([*TORCHRUN, str(script), str(tmp_path / "two"), str(data), "20"])
    one = start([str(script), str(tmp_path / "one"), str(data), "20"])
    for process in (two, one):
        errors = end_of(process)
        assert process.returncode == 0, errors
    ranks = [json.loads((tmp_path / f"two{rank}").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0][1] == 2
    found = {name: lines(tmp_path / f"{name}-run") for name in ("one", "two")}
    assert [line["step"] for line in found["two"]] == [line["step"] for line in found["one"]]
    # The same batches, whose mean gradient is taken in another order: k-means draws other rows, the rest agrees.
    last = {name: [line["loss"] for line in found[name] if "loss" in line][-1] for name in found}
    assert last["two"] == pytest.approx(last["one"], rel=0.2)
    assert len(list((tmp_path / "two-run" / "checkpoints").iterdir())) == 2


def test_a_process_that_dies_ends_the_run_and_names_itself(data, tmp_path):
    script = tmp_path / "ranks.py"
    death = """
from actok.training.engine import Trainer
step = Trainer._step
def dies(self, number, batch):
    if number == 7 and os.environ["RANK"] == "1":
        os._exit(9)
    step(self, number, batch)
Trainer._step = dies
"""
    script.write_text(RANKS.replace("torch.set_num_threads(1)", f"torch.set_num_threads(1){death}"))
    process = start([*TORCHRUN, str(script), str(tmp_path / "dead"), str(data), "500"])
    errors = end_of(process)
    assert process.returncode != 0
    assert "another of the 2 processes of this run ended or hung in step 8" in errors
    assert "start all again with --resume" in errors
    assert not (tmp_path / "dead0").exists()
