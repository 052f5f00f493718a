"""Settings of the whole test run: one thread per process, no network."""

import os
import sys
from pathlib import Path

from hypothesis import settings
from jaxtyping import install_import_hook

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

# So that tests in sub-folders can import `realdata`.
sys.path.insert(0, str(Path(__file__).parent))

# Every module whose signatures state shapes has them checked on each call, under test only. This has to come before the
# first import of actok. (A module with compiled functions cannot be checked and so states none.)
SOURCES = Path(__file__).parent.parent / "src"
SHAPED = sorted(
    ".".join(p.relative_to(SOURCES).with_suffix("").parts)
    for p in (SOURCES / "actok").rglob("*.py")
    if "\nfrom jaxtyping import " in p.read_text(encoding="utf-8")
)
install_import_hook(SHAPED, "shape_checker.checked")

# The same examples on every machine and in every run; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
