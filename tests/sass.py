"""Read the machine code (SASS) of the CUDA kernels, without a GPU: instructions by loop.

    python tests/sass.py "stage 1"                                   # sm_90, with a bias, bfloat16
    python tests/sass.py "stage 1" --capability 8.0 --tf32 --kernel forward --list

The problems are those of tests/test_natten/test_cuda_compile.py. Each row of the table is a loop; its counts leave out
the loops inside. The loop over chunks of columns is the one with the HMMA. `--list` also prints the code of that loop.
NVRTC compiles the kernels; nvdisasm comes with CUDA and with the Triton package.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from natten.backends.cuda import nvrtc
from natten.backends.cuda.driver import Kernel

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"`\((\.L_\w+)\)")
# The columns of the table: opcodes that begin with one of these.
COLUMNS = ("HMMA", "LDSM", "LDS", "STS", "LDG", "STG", "LDGSTS", "ATOMS", "MUFU", "SHFL", "BAR", "LDL", "STL")


class Instruction(NamedTuple):
    """One instruction: its address, its predicate or "", its opcode such as "LDS.128", its operands."""

    address: int
    predicate: str
    opcode: str
    operands: str


class Loop(NamedTuple):
    """A loop.

    Attributes:
        head: address of its first instruction.
        depth: number of loops around it.
        code: its instructions, without those of the loops inside.
    """

    head: int
    depth: int
    code: tuple[Instruction, ...]


@functools.cache
def find_nvdisasm() -> str | None:
    """Return the path of nvdisasm, from CUDA or the Triton package, or None."""
    found = shutil.which("nvdisasm")
    spec = None if found else importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec else None
    paths = [Path(folder, "backends", "nvidia", "bin", "nvdisasm") for folder in folders or ()]
    return found or next((str(path) for path in paths if path.exists()), None)


def compile_kernel(kernel: Kernel, capability: tuple[int, int]) -> bytes:
    """Compile a kernel to machine code with NVRTC, bypassing the cache."""
    definitions = (f"--define-macro={text}" for text in kernel.definitions)
    return nvrtc.compile_source(kernel.source, (*nvrtc.FLAGS, nvrtc.architecture(capability), *definitions))


def disassemble(code: bytes, name: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of one kernel, and the addresses of its labels.

    Raises:
        RuntimeError: with nvdisasm's message, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(code)
        done = subprocess.run([find_nvdisasm() or "nvdisasm", "-c", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {done.stderr.strip()}")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in done.stdout.partition(f".text.{name}:")[2].splitlines():
        found = _LINE.search(line)
        if found:
            address = int(found[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            instructions.append(Instruction(address, found[2] or "", found[3], found[4]))
        elif line.startswith(".L_"):
            waiting.append(line.strip().rstrip(":"))
        elif line.startswith(".text."):
            break  # another kernel of the same file
    return instructions, labels


def count(code: Sequence[Instruction], prefixes: Sequence[str] = COLUMNS) -> dict[str, int]:
    """Count instructions by opcode. "LDS" counts LDS.64 and LDS, but not LDSM."""
    opcodes = Counter(instruction.opcode.split(".")[0] for instruction in code)
    whole = Counter(instruction.opcode for instruction in code)
    return {p: opcodes[p] if "." not in p else sum(n for o, n in whole.items() if o.startswith(p)) for p in prefixes}


def find_loops(code: Sequence[Instruction], labels: dict[str, int]) -> list[Loop]:
    """Return the natural loops of a kernel, in the order of their heads. Loops with the same head are one."""
    next_of = _successors(code, labels)
    before: list[list[int]] = [[] for _ in code]
    for i, following in enumerate(next_of):
        for j in following:
            before[j].append(i)
    dominators = _dominators(next_of, before)
    bodies: dict[int, set[int]] = {}
    for i, following in enumerate(next_of):
        for head in following:
            if head != i and head <= i and _dominates(head, i, dominators):
                body, rest = bodies.setdefault(head, {head}), [i]
                while rest:
                    j = rest.pop()
                    if j not in body:
                        body.add(j)
                        rest += before[j]
    loops = []
    for head, body in sorted(bodies.items()):
        inner = set().union(*(b for h, b in bodies.items() if h != head and h in body and b < body), set())
        depth = sum(head in b for h, b in bodies.items() if h != head)
        loops.append(Loop(code[head].address, depth, tuple(code[i] for i in sorted(body - inner))))
    return loops


def _successors(code: Sequence[Instruction], labels: dict[str, int]) -> list[list[int]]:
    """Return which instructions may follow each instruction."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    following = []
    for i, instruction in enumerate(code):
        base, label = instruction.opcode.split(".")[0], _LABEL.search(instruction.operands)
        is_jump = base in ("BRA", "JMP", "WARPSYNC", "CALL") and label is not None and label[1] in labels
        only_label = label is not None and instruction.operands.strip("()` ") == label[1]
        is_last = not instruction.predicate and (base == "EXIT" or (base in ("BRA", "JMP") and only_label))
        found = [] if is_last or i + 1 == len(code) else [i + 1]
        if is_jump:
            found.append(index[labels[label[1]]])
        following.append(found)
    return following


def _dominators(next_of: list[list[int]], before: list[list[int]]) -> list[int]:
    """Return the immediate dominator of each instruction: -1 if it cannot be reached (Cooper, Harvey, Kennedy)."""
    order, seen, stack = [], {0}, [(0, iter(next_of[0]))]
    while stack:
        i, rest = stack[-1]
        for j in rest:
            if j not in seen:
                seen.add(j)
                stack.append((j, iter(next_of[j])))
                break
        else:
            order.append(i)
            stack.pop()
    rank = {i: n for n, i in enumerate(order)}  # the entry has the highest
    found = [-1] * len(next_of)
    found[0] = 0
    changed = True
    while changed:
        changed = False
        for i in reversed(order[:-1]):
            best = -1
            for j in before[i]:
                if found[j] < 0:
                    continue
                while best >= 0 and best != j:
                    if rank[best] < rank[j]:
                        best = found[best]
                    else:
                        j = found[j]
                best = j
            if best != found[i]:
                found[i], changed = best, True
    return found


def _dominates(head: int, i: int, dominators: list[int]) -> bool:
    while i > 0 and i != head and dominators[i] >= 0:
        i = dominators[i]
    return i == head


def main() -> None:
    from test_natten.test_cuda_compile import FUSED, OTHERS, TUNED, UNFUSED, kernels

    problems = TUNED | OTHERS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=problems)
    parser.add_argument("--capability", default="9.0", help="compute capability; default: 9.0")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this, such as grad_query")
    parser.add_argument("--tf32", action="store_true", help="float32 with TF32 instead of bfloat16")
    parser.add_argument("--no-bias", action="store_true", help="without a bias")
    parser.add_argument("--unfused", action="store_true", help="the unfused operators and their gradients")
    parser.add_argument("--list", action="store_true", help="also print the loops with matrix instructions")
    args = parser.parse_args()
    import torch

    capability = tuple(map(int, args.capability.split(".")))
    dtype = torch.float32 if args.tf32 else torch.bfloat16
    ops = UNFUSED if args.unfused else FUSED
    for kernel in kernels(*problems[args.problem], capability, dtype, not args.no_bias, args.tf32, ops):
        if args.kernel not in kernel.name:
            continue
        code, labels = disassemble(compile_kernel(kernel, capability), kernel.name)
        loops = find_loops(code, labels)
        print(f"\n{kernel.name}: {kernel.threads} threads, {kernel.shared_bytes} bytes of shared memory")
        print(" ".join(text for text in kernel.definitions))
        used = [p for p in COLUMNS if count(code, (p,))[p]]
        print(f"{'loop':>12s} {'all':>6s} " + " ".join(f"{p:>6s}" for p in used))
        rows = [("kernel", tuple(code))] + [(f"{'  ' * loop.depth}{loop.head:#x}", loop.code) for loop in loops]
        for name, part in rows:
            print(f"{name:<12s} {len(part):6d} " + " ".join(f"{n:6d}" for n in count(part, used).values()))
        for loop in loops if args.list else ():
            if count(loop.code)["HMMA"]:
                print(f"loop {loop.head:#x}:", *(f"  {' '.join(map(str, i[1:]))}" for i in loop.code), sep="\n")


if __name__ == "__main__":
    main()
