"""How every script of the project ends: user mistakes in one line with status 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


def run(main: Callable[[], Any]) -> None:
    """Runs a script's main function and turns what a user can mend into one line on stderr and exit status 2.

    The environment variable NATTEN_TRACEBACK=1 shows where the error was raised.
    """
    try:
        main()
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        if os.environ.get("NATTEN_TRACEBACK"):
            raise
        print(f"error: {_text(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; train.py goes on from its last epoch with --resume", file=sys.stderr)
        sys.exit(130)


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not error.filename:
        return error.strerror
    return str(error)
