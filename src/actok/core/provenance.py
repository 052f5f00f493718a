"""Under which conditions something was made: versions, machine, threads, commit, command, time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

__all__ = ["circumstances", "commit", "cpu_model", "package_versions", "thread_settings"]


def circumstances(packages: Sequence[str]) -> dict[str, Any]:
    """All of it as JSON values, with the versions of these packages."""
    from actok import __version__

    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "actok": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": package_versions(packages),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": thread_settings(),
    }


def package_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Installed version of each package, None where there is none."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def thread_settings() -> dict[str, str | None]:
    """The environment variables that limit threads."""
    return {name: os.environ.get(name) for name in THREADS}


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the checkout that actok runs from ("-dirty" with local changes), None where it is not a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        root = Path(git("rev-parse", "--show-toplevel"))
        if not (root / "src" / "actok").is_dir():
            return None  # an environment inside somebody else's repository
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", str(folder.parent)) else "")
    except (OSError, subprocess.SubprocessError):
        return None
