"""PyTorch's torchrun, which ends as the process of the run did that failed first: that has said why.

dist_train.sh starts it: `python classification/launch.py [options of torchrun] SCRIPT [options of the script]`.
"""

from __future__ import annotations

import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: list[str] | None = None) -> None:
    """Exits with the status of the process that failed first, or with 128 + the signal's number."""
    try:
        run.main(argv)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:  # of a signal
            name = signal.Signals(-failure.exitcode).name
            print(f"error: process {failure.local_rank} of this machine was ended by {name}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
