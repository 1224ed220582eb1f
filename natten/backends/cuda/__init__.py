"""The cuda backend: kernels in CUDA C++ (natten/csrc/cuda), compiled by NVRTC when a call first needs them.

Each problem has a plan: which kernels to launch, with how many blocks, and all their parameters except the addresses of
tensors. Plans are cached. Inputs must be finite, as for the reference backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import product
from math import gcd, prod
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from natten.backends.cuda import driver, first_use, nvrtc
from natten.backends.cuda.driver import Kernel
from natten.backends.cuda.tiles import Tile, choose_tile
from natten.backends.families import Family
from natten.backends.kernels import (
    DTYPES,
    TENSORS,
    KernelBackend,
    Unsupported,
    check_heads_and_dims,
    check_layout,
    unsupported_input,
    warn_fallback,
    with_fallback,
)
from natten.checks import cached, check_rpb
from natten.geometry import Axis

NAME = "cuda"
# The lowest compute capabilities: of all kernels, and of the kernels with matrix instructions.
MIN_CAPABILITY, MATRIX_CAPABILITY = (7, 5), (8, 0)

_TENSORS = (*TENSORS, "DELTA")  # DELTA: the sum of out * grad_out per query, an intermediate result of backward
_SHARED = ("KEY", "VALUE", "GRAD_KEY", "GRAD_VALUE")  # tensors that may have fewer heads
_VIEW_WORDS = 7
_PARAMS = Struct(f"={len(_TENSORS) * _VIEW_WORDS}q 3q 3i 3i 3i 3i 3i f")  # `Params` in problem.h
_TABLES = _VIEW_WORDS * len(_TENSORS)  # index of rpb; partial_rpb and grad_rpb follow
_TF32 = 3  # ELEMENT of Tfloat in instructions.h: float32 that matrix instructions round to TF32
_NO_AXIS = Axis(1, 1, 1, 1, False)

MAX_DIM = 256  # largest head_dim
_DIM_STEP = 8  # kernels with matrix instructions compute with a head_dim that is a multiple of it
_GROUP_THREADS = 128  # THREADS in groups.h
_SUM_THREADS, _SUM_ENTRIES = 1024, 32  # threads and table entries per block in sum_parts.cu
_WAVES = 2  # waves of blocks that sum the gradient of the bias table
_RESIDENT_GROUPS = 8  # approximate number of blocks of a kernel in groups.h that fit on a multiprocessor
_MAX_PARTIAL_BYTES = 64 << 20
_MIN_SCALE = 1e-30
_MAX_LENGTH, _MAX_TABLE = 1 << 30, 1 << 28  # tokens per axis, entries of the bias table per head
_PASSES = {"attention": "forward", "attention_backward": "backward"}  # of kernel families, by op
_PRECISIONS = ("float32", "bfloat16", "float16", "tf32")  # of kernel families, by ELEMENT
# Largest distance in bytes between neighbors in a residue class for which 32 such steps fit into an int.
_MAX_SHORT_STEP = 2**31 // 32 - 1


def unsupported_reason(query: Tensor) -> str | None:
    """Return why this backend cannot run a call with such a query (or value), or None if it can."""
    device = query.device
    if device.type == "mps":
        return warn_fallback(f"there are no kernels for {device.type} devices")
    if device.type != "cuda":
        return f"the tensors are on {device}"
    reason = unsupported_input(query, MAX_DIM)
    if reason is not None:
        return reason
    reason = _unsupported_device(device.index)
    return reason if reason is None else warn_fallback(reason)


@cache
def _unsupported_device(device: int) -> str | None:
    """Return why kernels cannot run on a device, or None if they can."""
    if torch.version.hip:
        return "there are no kernels for ROCm"
    gpu = _properties(device)
    capability = gpu.major, gpu.minor
    reason = unsupported_capability(capability)
    if reason is not None:
        return reason
    try:
        nvrtc.architecture(capability)
        driver.bindings()
    except (nvrtc.Unavailable, ImportError) as error:
        return str(error)
    return None


def unsupported_capability(capability: tuple[int, int]) -> str | None:
    """Return why no kernel runs on GPUs of a compute capability, or None if kernels do."""
    if capability >= MIN_CAPABILITY:
        return None
    return f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernels require 7.5 or higher"


_properties = cache(torch.cuda.get_device_properties)


def matrix_families(device: torch.device) -> list[Family]:
    """Return the families with matrix instructions on a device."""
    gpu = _properties(device)
    if (gpu.major, gpu.minor) < MATRIX_CAPABILITY:
        return []
    fused = [Family(*choice, True) for choice in product(("forward", "backward"), ("bfloat16", "float16", "tf32"))]
    return [*fused, *(Family("unfused", precision, True) for precision in ("bfloat16", "float16"))]


def allows_tf32() -> bool:
    """Return whether PyTorch's settings allow TF32 (10 bits of fraction) in float32 matrix products on GPUs."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _uses_matrix_instructions(query: Tensor, scale: float) -> bool:
    """Return whether fused attention for such a query uses kernels with matrix instructions, if a tile fits."""
    return _may_use_matrices(_element(query.dtype, allows_tf32()), scale, _properties(query.device))


def _element(dtype: torch.dtype, uses_tf32: bool) -> int:
    """Return ELEMENT of kernels with matrix instructions; 0 if there are none."""
    return _TF32 if dtype == torch.float32 and uses_tf32 else DTYPES[dtype]


def _may_use_matrices(element: int, scale: float, gpu) -> bool:
    is_divisor = _MIN_SCALE < scale < 1 / _MIN_SCALE  # kernels divide the bias by the scale
    return element != DTYPES[torch.float32] and is_divisor and (gpu.major, gpu.minor) >= MATRIX_CAPABILITY


def _with_aligned_rows(x: Tensor) -> Tensor:
    """Return the tensor, or a copy, with rows that are contiguous, and aligned as the kernels read them.

    They read as many elements at a time as fit into 16 bytes and divide head_dim.
    """
    items = gcd(x.shape[-1], 16 // x.element_size())
    *strides, last = x.stride()
    is_aligned = x.data_ptr() % (items * x.element_size()) == 0 and not any(stride % items for stride in strides)
    if last == 1 and is_aligned:
        return x
    return x.clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One launch: a kernel, the number of blocks, and the parameters with empty addresses."""

    kernel: Kernel
    blocks: int
    parameters: bytes


class Plan(NamedTuple):
    """The launches of a problem.

    Attributes:
        family: the kernel family of the launches.
        steps: the launches, in order.
        partial: number of floats in the workspace for partial gradients of rpb.
    """

    family: Family
    steps: tuple[Step, ...]
    partial: int


def launch(op: str, axes: Sequence[Axis], scale: float, rpb: Tensor | None, **tensors: Tensor) -> Tensor | None:
    """Launch the kernels of one op; see `KernelBackend` for the arguments.

    Returns:
        The gradient of rpb, or None if the op has none.

    Raises:
        Unsupported: if a limit is exceeded, if a kernel cannot be compiled, or if the kernels failed their self-check.
    """
    shaped = tensors["QUERY"] if "QUERY" in tensors else tensors["VALUE"]
    if op == "attention_backward":
        tensors["DELTA"] = torch.empty_like(tensors["LSE"], memory_format=torch.contiguous_format)
    uses_tf32 = shaped.dtype == torch.float32 and allows_tf32()
    plan = _plan(op, shaped, axes, scale, rpb, uses_tf32, tuple(tensors), *tensors.values())
    if plan.steps:
        reason = first_use.refusal(plan.family, shaped.device, KERNELS)
        if reason is not None:
            raise Unsupported(reason)
    table = None if rpb is None else rpb.detach().float().contiguous()
    partial = grad_rpb = None
    if op.endswith("_backward") and rpb is not None:
        make = rpb.new_empty if plan.steps else rpb.new_zeros
        grad_rpb = make(rpb.shape, dtype=torch.float32)
        partial = grad_rpb.new_empty(plan.partial)
    addresses = [(_VIEW_WORDS * _TENSORS.index(name), x.data_ptr()) for name, x in tensors.items()]
    for index, x in enumerate((table, partial, grad_rpb), start=_TABLES):
        if x is not None:
            addresses.append((index, x.data_ptr()))
    try:
        if len(plan.steps) > 1:
            driver.prepare([step.kernel for step in plan.steps], shaped.device.index)
        for step in plan.steps:
            parameters = (ctypes.c_int64 * (_PARAMS.size // 8)).from_buffer_copy(step.parameters)
            for index, address in addresses:
                parameters[index] = address
            driver.launch(step.kernel, step.blocks, parameters, shaped.device.index)
    except nvrtc.Unavailable as error:
        raise Unsupported(str(error)) from error
    return None if rpb is None or grad_rpb is None else grad_rpb.to(rpb.dtype)


@cached
def _plan(
    op: str,
    shaped: Tensor,
    axes: Sequence[Axis],
    scale: float,
    rpb: Tensor | None,
    uses_tf32: bool,
    names: tuple[str, ...],
    *tensors: Tensor,
) -> Plan:
    """Return the plan of a problem whose query (or value) is `shaped`, for the named tensors.

    Raises:
        Unsupported: if a limit is exceeded.
        ValueError: if a tensor does not match `shaped`.
    """
    check_rpb(rpb, axes, shaped.shape[-2], shaped.dtype, shaped.device)
    given = dict(zip(names, tensors, strict=True))
    heads, kv_heads, value_dim = shaped.shape[-2], shaped.shape[-2], shaped.shape[-1]
    if op.startswith("attention"):
        kv_heads, value_dim = given["KEY"].shape[-2], given["VALUE"].shape[-1]
    check_heads_and_dims(heads, kv_heads, shaped.shape[-1], value_dim)
    for name, x in given.items():
        # Kernels with matrix instructions compute the gradients of key and value for each head of the query.
        is_repeated = name in ("GRAD_KEY", "GRAD_VALUE") and x.shape[-2] == heads
        check_layout(name, x, shaped, axes, heads if is_repeated else kv_heads, value_dim)
    gpu = _properties(shaped.device)
    planner = _Planner(shaped, axes, scale, rpb is not None, uses_tf32, given, gpu)
    if shaped.numel():
        getattr(planner, op)()
    return Plan(planner.family(op), tuple(planner.steps), planner.partial)


def launches(
    op: str, shaped: Tensor, axes: Sequence[Axis], has_rpb: bool, gpu, value_dim: int | None = None
) -> tuple[Step, ...]:
    """Return the launches of a problem on a GPU, which need not be present.

    Args:
        op: a method of `KernelBackend`.
        shaped: a heads-last query (or value), on any device.
        axes: the axes of the problem.
        has_rpb: whether the problem has a bias.
        gpu: an object with the attributes `major`, `minor`, `multi_processor_count` and
            `shared_memory_per_block_optin` of `torch.cuda.get_device_properties`.
        value_dim: head_dim of the value, if it is not that of the query.
    """
    tensors = {} if value_dim is None else {"VALUE": shaped.new_empty(*shaped.shape[:-1], value_dim)}
    planner = _Planner(shaped, axes, 1.0, has_rpb, allows_tf32(), tensors, gpu)
    if shaped.numel():
        getattr(planner, op)()
    return tuple(planner.steps)


class _Planner:
    """Collect the launches of a problem. There is one method per op."""

    def __init__(self, shaped: Tensor, axes, scale, has_rpb: bool, uses_tf32: bool, tensors, gpu):
        self.axes = (*(_NO_AXIS,) * (3 - len(axes)), *axes)
        self.batch, self.heads, self.dim = shaped.shape[0], shaped.shape[-2], shaped.shape[-1]
        self.grad_heads = tensors.get("GRAD_KEY", shaped).shape[-2]
        self.value_dim = tensors.get("VALUE", shaped).shape[-1]
        self.element, self.gpu = DTYPES[shaped.dtype], gpu
        self.tiled_element = _element(shaped.dtype, uses_tf32)
        self.scale, self.has_rpb = scale, has_rpb
        self.views = self._views(tensors, 3 - len(axes)) if self.heads else ()
        self.has_long_steps = any(
            abs(stride) * axis.dilation * x.element_size() > _MAX_SHORT_STEP
            for x in tensors.values()
            for stride, axis in zip(x.stride()[1:], axes, strict=False)
        )
        self.table = prod(2 * axis.kernel_size - 1 for axis in self.axes)
        self.steps: list[Step] = []
        self.partial = 0
        self._check_limits()

    def _check_limits(self) -> None:
        """Raise Unsupported if indices of tokens or of the bias table do not fit into an int."""
        longest = max(axis.length for axis in self.axes)
        if longest > _MAX_LENGTH:
            raise Unsupported(f"an axis has {longest} tokens; the CUDA kernels support at most {_MAX_LENGTH}")
        if self.table > _MAX_TABLE:
            raise Unsupported(f"the bias table has {self.table} entries; the CUDA kernels support at most {_MAX_TABLE}")

    def family(self, op: str) -> Family:
        """Return the kernel family of the launches of an op."""
        is_tiled = any(step.kernel.shared_bytes for step in self.steps)
        element = self.tiled_element if is_tiled else self.element
        return Family(_PASSES.get(op, "unfused"), _PRECISIONS[element], is_tiled)

    def _views(self, tensors: dict[str, Tensor], missing_axes: int) -> tuple[int, ...]:
        words: list[int] = []
        for name in _TENSORS:
            x = tensors.get(name)
            strides = (0,) * 5 if x is None else (x.stride(0), *(0,) * missing_axes, *x.stride()[1 : 5 - missing_axes])
            group = 1 if x is None or name not in _SHARED else self.heads // x.shape[-2]
            words += (0, *strides, group)
        return tuple(words)

    # Ops

    def attention(self) -> None:
        tile = self._tile("forward", self.has_rpb)
        if tile is None:
            self._add_group("attention.cu", "natten_attention")
        else:
            self._add_tiled("attention_tiles.cu", "natten_attention_tiles", tile)

    def attention_backward(self) -> None:
        query_tile, key_tile = self._tile("grad_query", self.has_rpb), self._tile("grad_key_value", self.has_rpb)
        if query_tile is None or key_tile is None:
            parts = self._parts(self._group_size()) if self.has_rpb else None
            self._add_group("attention_backward.cu", "natten_grad_query", parts)
            self._add_group("attention_backward.cu", "natten_grad_key_value", heads=self.grad_heads)
        else:
            parts = self._parts(query_tile.size, query_tile.min_blocks) if self.has_rpb else None
            self._add_tiled("grad_query_tiles.cu", "natten_grad_query_tiles", query_tile, parts)
            self._add_tiled("grad_key_value_tiles.cu", "natten_grad_key_value_tiles", key_tile)
        if parts is not None:
            self._add_sum(parts)

    def query_key(self) -> None:
        tile = self._unfused_tile("logits", self.has_rpb)
        if tile is None:
            self._add_plain_unfused("natten_query_key")
        else:
            self._add_tiled_unfused("logits", tile, self.has_rpb, LEFT="QUERY", RIGHT="KEY", RESULT="ATTN")

    def query_key_backward(self) -> None:
        query_tile, key_tile = self._unfused_tile("gather", self.has_rpb), self._unfused_tile("scatter")
        if query_tile is None or key_tile is None:
            parts = self._parts(self._group_size()) if self.has_rpb else None
            self._add_plain_unfused("natten_query_key_grad_query")
            self._add_plain_unfused("natten_query_key_grad_key")
            if parts is not None:
                self._add_plain_unfused("natten_query_key_grad_rpb", parts)
        else:
            parts = self._parts(query_tile.size, query_tile.min_blocks) if self.has_rpb else None
            roles = {"WEIGHTS": "GRAD_ATTN", "ROWS": "KEY", "RESULT": "GRAD_QUERY"}
            self._add_tiled_unfused("gather", query_tile, self.has_rpb, parts, **roles)
            self._add_tiled_unfused("scatter", key_tile, WEIGHTS="GRAD_ATTN", ROWS="QUERY", RESULT="GRAD_KEY")
        if parts is not None:
            self._add_sum(parts)

    def weight_value(self) -> None:
        tile = self._unfused_tile("gather")
        if tile is None:
            self._add_plain_unfused("natten_weight_value")
        else:
            self._add_tiled_unfused("gather", tile, WEIGHTS="ATTN", ROWS="VALUE", RESULT="OUT")

    def weight_value_backward(self) -> None:
        attn_tile, value_tile = self._unfused_tile("logits"), self._unfused_tile("scatter")
        if attn_tile is None or value_tile is None:
            self._add_plain_unfused("natten_weight_value_grad_weight")
            self._add_plain_unfused("natten_weight_value_grad_value")
        else:
            self._add_tiled_unfused("logits", attn_tile, LEFT="GRAD_OUT", RIGHT="VALUE", RESULT="GRAD_ATTN")
            self._add_tiled_unfused("scatter", value_tile, WEIGHTS="ATTN", ROWS="GRAD_OUT", RESULT="GRAD_VALUE")

    # Launches

    def _unfused_tile(self, kernel: str, has_rpb: bool = False) -> Tile | None:
        """Return the tile of a kernel of unfused attention, like `_tile`.

        There is none in TF32, for a head_dim that is no multiple of 8 or above MAX_DIM, or if the weights of 16 tokens
        are too large for shared memory.
        """
        is_supported = self.tiled_element != _TF32 and self.dim % _DIM_STEP == 0 and self.dim <= MAX_DIM
        return self._tile(kernel, has_rpb) if is_supported else None

    def _tile(self, kernel: str, has_rpb: bool) -> Tile | None:
        """Return the tile of a kernel with matrix instructions, or None if it does not support this problem or GPU.

        Args:
            kernel: one of `tiles.KERNELS` or `tiles.UNFUSED_KERNELS`.
            has_rpb: whether the kernel reads the bias, or computes its gradient.
        """
        gpu = self.gpu
        if not _may_use_matrices(self.tiled_element, self.scale, gpu):
            return None
        return choose_tile(
            kernel,
            self.axes,
            -(-max(self.dim, self.value_dim) // _DIM_STEP) * _DIM_STEP,
            maps=self.batch * self.heads,
            has_rpb=has_rpb,
            processors=gpu.multi_processor_count,
            max_shared_bytes=gpu.shared_memory_per_block_optin,
            item_bytes=4 if self.tiled_element == _TF32 else 2,
        )

    def _group_size(self) -> tuple[int, int, int]:
        lanes = 1 << (-(-max(self.dim, self.value_dim) // 8) - 1).bit_length()
        return 1, 1, _GROUP_THREADS // lanes

    def _cuts(self, size: Sequence[int]) -> list[int]:
        """Return the number of pieces of a given size per residue class, along each axis."""
        return [-(-axis.length // (axis.dilation * q)) for axis, q in zip(self.axes, size, strict=True)]

    def _pieces(self, size: Sequence[int]) -> int:
        """Return the number of pieces of a given size per head, over all images and residue classes."""
        return self.batch * prod(self._cuts(size)) * prod(axis.dilation for axis in self.axes)

    def _parts(self, size: Sequence[int], resident: int = _RESIDENT_GROUPS) -> int:
        """Return how many blocks share the pieces of a head if each sums a partial gradient of the bias table.

        The blocks make up a few waves, with `resident` blocks per multiprocessor. With fewer blocks, most of the GPU
        waits for the slowest one. Each further block costs another partial table.
        """
        max_parts = max(1, _MAX_PARTIAL_BYTES // (4 * self.table * self.heads))
        return min(self._pieces(size), max_parts, -(-_WAVES * self.gpu.multi_processor_count * resident // self.heads))

    def _add_group(self, source: str, name: str, parts: int | None = None, heads: int | None = None) -> None:
        definitions = self._definitions(self.element, self.has_rpb)
        self._add(Kernel(source, name, definitions, _GROUP_THREADS), self._group_size(), parts, heads=heads)

    def _add_plain_unfused(self, name: str, parts: int | None = None) -> None:
        definitions = self._definitions(self.element, has_rpb=True)
        self._add(Kernel("unfused.cu", name, definitions, _GROUP_THREADS), self._group_size(), parts)

    def _add_tiled(
        self, source: str, name: str, tile: Tile, parts: int | None = None, definitions: tuple[str, ...] | None = None
    ) -> None:
        if definitions is None:
            definitions = self._definitions(self.tiled_element, self.has_rpb)
        kernel = Kernel(source, name, (*definitions, *tile.definitions()), tile.threads, tile.shared_bytes)
        self._add(kernel, tile.size, parts, tile.slices)

    def _add_tiled_unfused(
        self, name: str, tile: Tile, has_rpb: bool = False, parts: int | None = None, **tensors: str
    ) -> None:
        """Add a kernel of `tiles.UNFUSED_KERNELS`. tensors: which tensors it reads and writes, under its names."""
        roles = (f"{role}={tensor}" for role, tensor in tensors.items())
        definitions = (*self._definitions(self.tiled_element, has_rpb), *roles)
        self._add_tiled(f"{name}_tiles.cu", f"natten_{name}_tiles", tile, parts, definitions)

    def _add_sum(self, parts: int) -> None:
        self.partial = self.heads * parts * self.table
        definitions = [f"KERNEL_{letter}={axis.kernel_size}" for letter, axis in zip("ZYX", self.axes, strict=True)]
        kernel = Kernel("sum_parts.cu", "natten_sum_parts", tuple(definitions), _SUM_THREADS)
        self._add(kernel, (1, 1, 1), parts, blocks=-(-self.table // _SUM_ENTRIES) * self.heads)

    def _add(
        self,
        kernel: Kernel,
        size: Sequence[int],
        parts: int | None,
        slices: int = 1,
        blocks: int | None = None,
        heads: int | None = None,
    ) -> None:
        """Add a launch over the pieces of a given size.

        Args:
            parts: number of blocks that share the pieces of a head; by default one block per piece.
            slices: number of blocks that share head_dim.
            blocks: total number of blocks, if it does not follow from the other arguments.
            heads: number of heads; by default those of the query.
        """
        pieces, heads = self._pieces(size), self.heads if heads is None else heads
        parts = pieces if parts is None else parts
        blocks = parts * slices * heads if blocks is None else blocks
        if max(blocks, pieces) >= 2**31:
            raise Unsupported(
                f"query requires {max(blocks, pieces)} blocks, but a GPU launches fewer than 2**31; split the batch"
            )
        classes = [divmod(axis.length, axis.dilation) for axis in self.axes]
        parameters = _PARAMS.pack(
            *self.views,
            *(0, 0, 0),
            *(pieces, parts, heads),
            *(axis.dilation for axis in self.axes),
            *(tokens for tokens, _ in classes),
            *(longer for _, longer in classes),
            *self._cuts(size),
            self.scale,
        )
        self.steps.append(Step(kernel, blocks, parameters))

    def _definitions(self, element: int, has_rpb: bool) -> tuple[str, ...]:
        definitions = [f"HEAD_DIM={self.dim}", f"VALUE_DIM={self.value_dim}", f"ELEMENT={element}"]
        definitions += [f"HAS_RPB={int(has_rpb)}", f"HAS_LONG_STEPS={int(self.has_long_steps)}"]
        for letter, axis in zip("ZYX", self.axes, strict=True):
            definitions.append(f"KERNEL_{letter}={axis.kernel_size}")
            definitions.append(f"STRIDE_{letter}={axis.stride}")
            definitions.append(f"CAUSAL_{letter}={int(axis.is_causal)}")
        return tuple(definitions)


# ---------------------------------------------------------------------------------------------------------------------
# The interface of natten.backends.Backend
# ---------------------------------------------------------------------------------------------------------------------

KERNELS = KernelBackend(launch, _with_aligned_rows, MAX_DIM, _uses_matrix_instructions)
attention, attention_backward = with_fallback(KERNELS.attention), with_fallback(KERNELS.attention_backward)
query_key, query_key_backward = with_fallback(KERNELS.query_key), with_fallback(KERNELS.query_key_backward)
weight_value, weight_value_backward = with_fallback(KERNELS.weight_value), with_fallback(KERNELS.weight_value_backward)
