"""The smoke test: kernels with matrix instructions in each precision, forward and backward; and the self-check."""

from __future__ import annotations

import torch

import natten
from gpu_checks.problems import PRECISIONS, errors, is_good, machine
from gpu_checks.rows import Writer
from natten.backends import cuda
from natten.backends.self_check import run_self_check

_STAGE = ((2, (56, 56), 2, 32), (7,))  # shape and window of NAT-Tiny's first stage
_SELF_CHECK_S = 0.5
_TINY = ((1, (9, 9), 2, 8), (3,))


def run(writer: Writer, is_rehearsal: bool) -> None:
    """Run the part `smoke` or `self-check`."""
    if writer.part == "self-check":
        return _check_families(writer, is_rehearsal)
    if not is_rehearsal:
        gpu = torch.cuda.get_device_properties(0)
        name = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors"
        writer.measured("GPU", name)
        writer.measured("PyTorch, CUDA, natten", f"{torch.__version__}, {torch.version.cuda}, {natten.__version__}")
        reason = cuda.unsupported_reason(torch.empty(1, 1, 1, 8, device="cuda:0"))
        writer.checked("kernels are available", reason is None, reason or "yes")
    for precision in PRECISIONS:
        if precision == "float32":  # without matrix instructions
            continue
        shape, window = _TINY if is_rehearsal else _STAGE
        pairs = errors(machine(is_rehearsal), precision, shape, window, seed=0)
        worst = max(error / max(8 * peer_error, 1.0) for error, peer_error in pairs)
        text = f"{worst:.2f} of the error that is allowed"
        writer.checked(f"{precision}, forward and backward", all(is_good(*pair) for pair in pairs), text)


def _check_families(writer: Writer, is_rehearsal: bool) -> None:
    """Add the rows of `python -m natten.check`."""
    for row in run_self_check("cpu" if is_rehearsal else "cuda"):
        error = "no result" if row.largest_error is None else f"error {row.largest_error:.1e}"
        writer.checked(row.name, row.verdict == "passed", f"{error} {row.detail}".rstrip())
        if not is_rehearsal:
            writer.judged(f"{row.name}, duration with compilation", row.seconds, _SELF_CHECK_S, unit=" s")
