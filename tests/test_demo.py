"""The demo: light on the user's own data, and with a policy that acts where it collects by itself."""

import argparse
import json
import subprocess
import sys

import numpy as np

from actok.cli import demo, main
from actok.core.registry import find_preset
from actok.envs import make_env
from actok.policies.load import load_policy
from actok.policies.presets import find_policy_preset

TINY = demo.PolicyDemo(
    env="metaworld-state",
    tasks=("reach-v3",),
    demonstrations=10,
    tokenizer="beast:bases=5",
    horizon=7,
    settings={"backbone": {"width": 16, "layers": 1, "heads": 2}, "state": "vector"},
    training={"steps": 3, "batch_size": 5},
    episodes=2,
    execute=5,
)


def test_own_data_need_neither_torch_nor_a_simulator(tmp_path):
    rng = np.random.default_rng(0)
    lengths = np.full(11, 31)
    actions = rng.uniform(-1, 1, (lengths.sum(), 3)).astype(np.float32).cumsum(0)
    np.savez(tmp_path / "demos.npz", action=actions, episode_length=lengths, control_hz=11.0)
    script = (
        "import sys; from actok.cli import main; code = main(sys.argv[1:]);"
        " heavy = {'torch', 'mujoco', 'metaworld'} & sys.modules.keys(); assert not heavy, heavy; sys.exit(code)"
    )
    command = ["demo", "--data", str(tmp_path / "demos.npz"), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert {"report.html", "results.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "policy").exists()
    assert "A policy" not in done.stdout


def test_a_missing_package_is_said_before_anything_is_collected(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda package: None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'actok[torch]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_policy_is_trained_on_tokens_kept_and_rolled_out(tmp_path, capsys):
    arguments = argparse.Namespace(seed=0, workers=1)
    demo.act(TINY, tmp_path, arguments)
    told = capsys.readouterr().out
    assert "collecting 10 demonstrations" in told
    assert "reach-v3" in told
    policy = load_policy(tmp_path / "policy")
    assert (policy.tokenizer.kind, policy.horizon, policy.heads) == ("beast", 7, ("tokens",))
    assert policy.meta["training"]["steps"] == 3
    stored = json.loads((tmp_path / "rollout" / "rollout.json").read_text())
    assert (len(stored["success"]), stored["execute"], stored["invalid"]) == (2, 5, 0)
    assert (tmp_path / "rollout" / "rollout.html").exists()
    assert all(f"{film['sheet']}" in told for film in stored.get("recordings", []))

    assert demo._collected(tmp_path, TINY.env, "reach-v3", 10, arguments) == str(tmp_path / TINY.env)
    assert "using the demonstrations" in capsys.readouterr().out


def test_what_the_demo_names_exists():
    chosen = demo.POLICY
    env = make_env(chosen.env)
    assert set(chosen.tasks) <= set(env.tasks)
    assert env.proprio_size != make_env(chosen.env.removesuffix("-state")).proprio_size
    find_preset(chosen.tokenizer.split(":")[0])
    find_policy_preset(chosen.preset)
    assert 1 <= chosen.execute <= chosen.horizon
