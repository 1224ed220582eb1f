"""How every script of the project ends: user mistakes in one line with status 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

MISTAKES = (ValueError, OSError, NotImplementedError, ImportError)  # what a user can mend


def run(main: Callable[[], Any], after_interrupt: str = "") -> None:
    """Runs a script's main function and turns what a user can mend into one line on stderr and exit status 2.

    On Ctrl-C it says so, and `after_interrupt`. NATTEN_TRACEBACK=1 in the environment shows where an error was raised.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except MISTAKES as error:
        if os.environ.get("NATTEN_TRACEBACK"):
            raise
        print(f"error: {_text(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("; ".join(filter(None, ("interrupted", after_interrupt))), file=sys.stderr)
        sys.exit(130)


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not error.filename:
        return error.strerror
    return str(error)
