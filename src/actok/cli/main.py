"""`actok`: parse, run one verb, and end with an exit code that scripts can trust.

0    done
1    an error, told in one line on stderr (--debug shows the traceback)
2    the command line could not be understood
3    done, but something in it failed: a sequence that did not decode, a tokenizer that could not be fitted
130  interrupted; no file was left half-written
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from actok.cli.parser import build_parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    warnings.showwarning = _one_line_warning
    try:
        code = importlib.import_module(f"actok.cli.{args.module}").run(args)
        sys.stdout.flush()
        return int(code or 0)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader of our output went away (`actok list | head -1`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from actok.core.errors import ActokError, follows_interrupt

        if follows_interrupt(error):
            return _interrupted()
        if args.debug:
            raise
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename is not None and not isinstance(error, ActokError):
            text = f"{error.filename}: {error.strerror}; name a path that can be read and written"
        elif not isinstance(error, ActokError):
            text = f"{type(error).__name__}: {text} (run again with --debug for the traceback)"
        print(f"actok: error: {text}", file=sys.stderr)
        return 1


def _interrupted() -> int:
    print("actok: interrupted; no file was left half-written", file=sys.stderr)
    return 130


def _one_line_warning(message: Any, category: type, *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"actok: warning: {message}", file=sys.stderr)
