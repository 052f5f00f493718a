"""Suites over datasets and tokenizers: results.json first, tables and the HTML report from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Loaded on first use, so that `actok --help` stays free of NumPy.
_LAZY = {
    "read_results": "actok.benchmark.results",
    "replay_held_out": "actok.benchmark.replays",
    "replay_text": "actok.benchmark.replays",
    "run_benchmark": "actok.benchmark.suite",
    "text_table": "actok.benchmark.table",
    "write_outputs": "actok.benchmark.suite",
    "write_report": "actok.benchmark.report",
}

if TYPE_CHECKING:
    from actok.benchmark.replays import replay_held_out, replay_text
    from actok.benchmark.report import write_report
    from actok.benchmark.results import read_results
    from actok.benchmark.suite import run_benchmark, write_outputs
    from actok.benchmark.table import text_table

__all__ = [
    "read_results",
    "replay_held_out",
    "replay_text",
    "run_benchmark",
    "text_table",
    "write_outputs",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'actok.benchmark' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
