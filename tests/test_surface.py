"""What others script against: the package's import, the verbs, the exit codes."""

import json
import os
import subprocess
import sys
import time

import pytest

CLOSED_FORM = ("bins", "beast", "dct", "fast", "pca")
HEAVY = ("torch", "transformers", "scipy", "matplotlib", "pyarrow", "metaworld", "mujoco", "h5py", "numba")


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)


def best_time(command: list[str], runs: int = 5) -> float:
    """Fastest of several runs: the machine's noise only ever adds."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return min(times)


@pytest.mark.parametrize(
    "code",
    ["import actok", "from actok.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"],
    ids=["import actok", "actok --help"],
)
def test_import_and_help_are_light_and_fast(code):
    loaded = python(f"{code}\nimport sys; print('\\n' + ','.join(sys.modules))")
    assert loaded.returncode == 0, loaded.stderr
    modules = {m.split(".")[0] for m in loaded.stdout.splitlines()[-1].split(",")}
    assert not modules & {*HEAVY, "numpy", "jaxtyping"}
    assert best_time([sys.executable, "-c", code]) < 0.5


def test_the_core_works_without_torch():
    """With torch made impossible to import, closed-form presets work and learned ones say what to install."""
    done = python(
        "import sys, tempfile\n"
        "for name in ('torch', 'transformers', 'numba', 'matplotlib', 'h5py', 'metaworld'): sys.modules[name] = None\n"
        "import numpy as np, actok\n"
        "chunks = np.random.default_rng(0).normal(size=(64, 8, 3)).cumsum(1).astype('float32')\n"
        "done = 0\n"
        "for name in actok.list_tokenizers():\n"
        "    try: tok = actok.fit(name, chunks)\n"
        "    except actok.core.MissingExtraError as error:\n"
        "        assert 'actok[torch]' in str(error), error\n"
        "        continue\n"
        "    done += 1\n"
        "    with tempfile.TemporaryDirectory() as folder:\n"
        "        tok = actok.load(tok.save_pretrained(folder + '/t'))\n"
        "    assert tok.decode(tok.encode(chunks[:5]).ids, horizon=8).valid.all(), name\n"
        "print(done)\n"
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(CLOSED_FORM)


def test_list_names_every_preset_and_loads_no_torch():
    done = subprocess.run([sys.executable, "-m", "actok", "list", "--json"], capture_output=True, text=True, timeout=60)
    import actok

    assert [row["name"] for row in json.loads(done.stdout)] == actok.list_tokenizers()
    loaded = python(
        "from actok.cli import main; main(['list']); import sys; print([m for m in sys.modules if m == 'torch'])"
    )
    assert loaded.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "code"), [([], 2), (["nonsense"], 2), (["list"], 0), (["inspect", "/nowhere"], 1), (["--version"], 0)]
)
def test_exit_codes(arguments, code):
    done = subprocess.run([sys.executable, "-m", "actok", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_policies_are_reached_from_the_package_without_loading_torch_before():
    done = python(
        "import actok, sys\n"
        "assert {'train_policy', 'load_policy', 'fit', 'load'} <= set(dir(actok))\n"
        "assert 'torch' not in sys.modules\n"
        "print(actok.train_policy.__module__, actok.load_policy.__module__)\n"
    )
    assert done.stdout.split() == ["actok.training.policy", "actok.policies.load"], done.stderr
