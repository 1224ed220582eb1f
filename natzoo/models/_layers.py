"""Layers shared by all model families. Feature maps are channels-last.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from natten import NeighborhoodAttention2D
from natten.tracing import refuse_script
from natzoo.checkpoints import load_weights, read_weights

log = logging.getLogger("natzoo")

# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Embed non-overlapping PxP patches: [B, in_chans, H, W] -> [B, H/P, W/P, embed_dim]; images are zero-padded."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int = 4, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, **dd)
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        x_BCHW = F.pad(x_BCHW, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.norm(to_nhwc(self.proj(x_BCHW)))


class LeanMlp(Mlp):
    """timm's Mlp with less activation memory: fc2 does not store the output of GELU, but recomputes it for backward.

    A training step of NAT-Mini needs 15% less memory and 2% more time. All layers are called as in Mlp: what is
    recomputed is decided when fc2, whatever it is, stores its input.
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.drop1(self.act(self.fc1(x))))
        with _recompute_gelu(hidden):
            x = self.fc2(hidden)
        return self.drop2(x)


def _recompute_gelu(hidden: Tensor) -> AbstractContextManager:
    """Return a context in which autograd recomputes `hidden` instead of storing it, if it is the output of GELU.

    The context does nothing under torch.compile, which makes its own choice of what to recompute, under torch.func, and
    where others decide what is stored, such as activation checkpointing.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(hidden) is not Tensor or hidden.is_leaf:
        return nullcontext()
    gelu: Any = hidden.grad_fn
    if type(gelu).__name__ != "GeluBackward0" or hidden._version > 0 or not _can_decide_what_is_stored():
        return nullcontext()
    x, approximate = gelu._saved_self.detach(), gelu._saved_approximate
    address, layout = hidden.data_ptr(), (hidden.dtype, hidden.numel())

    def store(tensor: Tensor) -> Any:
        is_hidden = tensor.data_ptr() == address and (tensor.dtype, tensor.numel()) == layout and not tensor._version
        return (tensor.size(), tensor.stride()) if is_hidden else tensor

    def load(stored: Any) -> Tensor:
        return stored if isinstance(stored, Tensor) else F.gelu(x, approximate=approximate).as_strided(*stored)

    return torch.autograd.graph.saved_tensors_hooks(store, load)


def _can_decide_what_is_stored() -> bool:
    autograd: Any = torch._C._autograd
    return autograd._saved_tensors_hooks_is_enabled() and autograd._top_saved_tensors_default_hooks(True) is None


class NeighborhoodBlock(nn.Module):
    """Pre-norm transformer block with neighborhood attention, [B, H, W, dim] -> [B, H, W, dim].

    See NAT (arXiv:2204.07143), figure 5.

    Args:
        dim: number of channels.
        num_heads: number of attention heads.
        kernel_size: window size in tokens.
        dilation: dilation of the window.
        mlp_ratio: ratio of the MLP's hidden channels to dim.
        qkv_bias: add a bias to the qkv projection.
        proj_drop: dropout rate after the output projections of attention and MLP.
        attn_drop: dropout rate on attention weights.
        drop_path: stochastic depth rate of each of the two branches.
        layer_scale: initial value of the learned scale of each branch; None for no scale.
        attn: attention layer to use instead, [B, H, W, dim] -> [B, H, W, dim].
    """

    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        attn: nn.Module | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn or NeighborhoodAttention2D(
            dim, num_heads, kernel_size, dilation, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd
        )
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = LeanMlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **dd))
            self.register_parameter(name, gamma)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.add_branches(x_BHWC, self.attn(self.norm1(x_BHWC)))

    def add_branches(self, x_BHWC: Tensor, attended_BHWC: Tensor) -> Tensor:
        """Return the output of the block, from its input and the output of its attention layer."""
        x_BHWC = x_BHWC + self.drop_path(_scale(attended_BHWC, self.gamma1))
        return x_BHWC + self.drop_path(_scale(self.mlp(self.norm2(x_BHWC)), self.gamma2))


def _scale(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


# Pooling of the final feature map [B, H, W, C] by the name that timm gives it.
_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x_BHWC: x_BHWC.mean((1, 2)),
    "max": lambda x_BHWC: x_BHWC.amax((1, 2)),
    "avgmax": lambda x_BHWC: 0.5 * (x_BHWC.mean((1, 2)) + x_BHWC.amax((1, 2))),
    "": lambda x_BHWC: x_BHWC,
}


class Classifier(nn.Module):
    """Base class of all models: pooling, dropout and a linear classifier, and timm's interface to them.

    A subclass sets the attributes below, calls `init_classifier` at the end of its constructor, and implements
    `forward_features`.

    Attributes:
        in_chans: number of image channels.
        num_features: channels of the final feature map.
        patch_embed: embeds images, ending with a norm.
        norm: final norm.
    """

    in_chans: int
    num_features: int
    patch_embed: Any
    norm: nn.Module
    output_fmt = "NHWC"

    def init_classifier(self, num_classes: int, global_pool: str, drop_rate: float, **dd: Any) -> None:
        """Create the classifier.

        Args:
            num_classes: number of classes; 0 for no classifier.
            global_pool: "avg", "max" or "avgmax" (mean of both), or "" to classify each token.
            drop_rate: dropout rate before the classifier.
            dd: device and dtype.

        Raises:
            ValueError: if global_pool is unknown.
        """
        if global_pool not in _POOLS:
            raise ValueError(f"global_pool is {global_pool!r}; use one of {', '.join(map(repr, _POOLS))}.")
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.head_hidden_size = self.num_features
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def load_pretrained(self, path: str, prefix: str = "") -> None:
        """Load a weight file; timm calls this for `pretrained=True`.

        The model keeps its own classifier if the file has another number of classes. `prefix` is ignored: natzoo
        recognizes the prefixes of detectors and wrapped models.

        Raises:
            FileNotFoundError, OSError: if the file cannot be read.
            ValueError: if it is not a checkpoint of this model.
        """
        for note in load_weights(self, read_weights(path), path, new_classifier=True):
            log.warning("%s: %s", path, note)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: the relative position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier with a new one, in the mode, device and dtype of the model.

        Args:
            num_classes: number of classes; 0 for no classifier.
            global_pool: as in `init_classifier`; None to keep the current value.

        Raises:
            ValueError: if global_pool is unknown.
        """
        weight = self.patch_embed.norm.weight
        global_pool = self.global_pool if global_pool is None else global_pool
        self.init_classifier(num_classes, global_pool, self.head_drop.p, device=weight.device, dtype=weight.dtype)
        self.head.apply(init_linear)
        self.head.train(self.training)
        self.head_drop.train(self.training)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Compute the final, normalized feature map [B, H, W, num_features]."""
        raise NotImplementedError

    def forward_head(self, x_BHWC: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits from the final feature map [B, H, W, num_features].

        Args:
            x_BHWC: result of `forward_features`.
            pre_logits: return the features that the classifier would receive instead.

        Returns:
            Logits [B, num_classes], or [B, H, W, num_classes] without pooling.
        """
        x = self.head_drop(_POOLS[self.global_pool](x_BHWC))
        return x if pre_logits else self.head(x)

    def format_intermediate(self, x_BHWC: Tensor, norm: bool, output_fmt: str) -> Tensor:
        """Convert a feature map to the output format of `forward_intermediates`, normalized if requested."""
        feature = self.norm(x_BHWC) if norm else x_BHWC
        return to_nchw(feature).contiguous() if output_fmt == "NCHW" else feature

    def prune_end(self, prune_norm: bool, prune_head: bool) -> None:
        """Remove the final norm and the classifier, for `prune_intermediate_layers`."""
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.num_classes = 0
            self.head = nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_BCHW))


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


def run_blocks(blocks: Iterable[nn.Module], x_BHWC: Tensor, use_checkpoint: bool) -> Tensor:
    """Apply blocks in order; with `use_checkpoint`, training recomputes them in the backward pass to save memory."""
    for block in blocks:
        is_checkpointed = use_checkpoint and block.training and not torch.jit.is_scripting()
        x_BHWC = checkpoint(block, x_BHWC) if is_checkpointed else block(x_BHWC)
    return x_BHWC


def check_dilations(dilations: Sequence[Sequence[int]] | None, depths: Sequence[int]) -> list[list[int]]:
    """Return one dilation per block, as one list per stage; None means 1 everywhere.

    Raises:
        ValueError: if the number of dilations differs from the number of blocks; names the stage.
    """
    if dilations is None:
        return [[1] * depth for depth in depths]
    if len(dilations) != len(depths):
        raise ValueError(f"dilations has {len(dilations)} stages, but depths has {len(depths)}.")
    for stage, (values, depth) in enumerate(zip(dilations, depths, strict=True)):
        if len(values) != depth:
            raise ValueError(
                f"dilations[{stage}] has {len(values)} values, but depths[{stage}] is {depth}; use one dilation per "
                "block."
            )
    return [list(values) for values in dilations]


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return stochastic depth rates that rise linearly from 0 in the first block to `rate` in the last."""
    last = max(sum(depths) - 1, 1)
    rates = iter(rate * block / last for block in range(sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]


def check_output_fmt(output_fmt: str) -> None:
    """Raise ValueError if `forward_intermediates` does not support a format."""
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f"output_fmt is {output_fmt!r}; use 'NCHW' or 'NHWC'.")


def init_linear(module: nn.Module) -> None:
    """Initialize a linear layer: weights truncated normal with std 0.02, biases 0. Ignore other layers."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def to_nchw(x_BHWC: Tensor) -> Tensor:
    """Convert channels-last to channels-first."""
    return x_BHWC.permute(0, 3, 1, 2)


def to_nhwc(x_BCHW: Tensor) -> Tensor:
    """Convert channels-first to channels-last."""
    return x_BCHW.permute(0, 2, 3, 1)
