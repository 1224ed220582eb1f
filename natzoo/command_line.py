"""Run a program so that user errors are printed on one line and exit with status 2, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

# Errors that the user can fix.
USER_ERRORS = (ValueError, OSError, NotImplementedError, ImportError)


def run(main: Callable[[], Any], after_interrupt: str = "") -> None:
    """Call the main function of a program and exit without a traceback on a user error or Ctrl-C.

    With NATTEN_TRACEBACK=1 in the environment, user errors print a traceback.

    Args:
        main: the function.
        after_interrupt: hint to print after Ctrl-C.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except USER_ERRORS as error:
        if os.environ.get("NATTEN_TRACEBACK"):
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("; ".join(filter(None, ("interrupted", after_interrupt))), file=sys.stderr)
        sys.exit(130)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # str(error) would start with [Errno N]
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
