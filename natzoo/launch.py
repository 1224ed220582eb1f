"""Run torchrun and exit with the status of the process that failed first.

python -m natzoo.launch [options of torchrun] SCRIPT [options of the script]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from natzoo.command_line import LAUNCHER


def main(argv: Sequence[str] | None = None) -> None:
    """Run torchrun without its traceback; the failed process has already printed its own error.

    Exits with the status of the process that failed first, or with 128 + the number of the signal.
    """
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        run.main(argv)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:  # killed by a signal
            name = signal.Signals(-failure.exitcode).name
            print(f"error: local rank {failure.local_rank} was killed by {name}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
