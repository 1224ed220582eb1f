"""Replacement for `mmcv._ext`, the compiled operators of mmcv, implemented with torchvision.

Functions have the names and arguments that mmcv.ops uses, and write results into the tensors that mmcv passes for them.
float16 and bfloat16 inputs are computed in float32. mmcv looks up all of its operators when it is imported; those that
no model of this project uses raise NotImplementedError when called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
import torchvision.ops
from torch import Tensor

_SOFT_NMS_METHODS = {0: "naive", 1: "linear", 2: "gaussian"}


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs) -> NoReturn:
        raise NotImplementedError(
            f"{name} is not implemented without compiled mmcv; install mmcv instead of mmcv-lite."
        )

    return missing


def _to_float(x: Tensor) -> Tensor:
    """Cast half precision to float32: torchvision supports float16 only on GPUs, and bfloat16 nowhere."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ---------------------------------------------------------------------------------------------------------------------
# Non-maximum suppression. Boxes [N, 4] are (x1, y1, x2, y2); offset 1 means that x2 and y2 belong to the box.
# ---------------------------------------------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices of the kept boxes in descending order of score, int64 [M]."""
    boxes, scores = _to_float(boxes), _to_float(scores)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, scores, iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    *,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Apply Soft-NMS (arXiv:1704.04503) and return the indices of the kept boxes, int64 [M].

    Each kept box multiplies the scores of the boxes that overlap it by 0 ("naive"), 1 - IoU ("linear") or
    exp(-IoU^2 / sigma) ("gaussian"). The kept boxes and their reduced scores are written to the first M rows of `dets`
    [N, 5].
    """
    rest = _to_float(boxes).clone()
    rest_scores, indices = _to_float(scores).clone(), torch.arange(len(boxes))
    kept = []
    while len(rest):
        best = rest_scores.argmax()
        if rest_scores[best] < min_score:
            break
        box, score = rest[best], rest_scores[best]
        dets[len(kept), :4], dets[len(kept), 4] = box, score
        kept.append(int(indices[best]))
        others = torch.arange(len(rest)) != best
        rest, rest_scores, indices = rest[others], rest_scores[others], indices[others]
        overlap = _iou(box, rest, offset)
        rest_scores = rest_scores * _decay_factor(_SOFT_NMS_METHODS[method], overlap, iou_threshold, sigma)
        strong = rest_scores >= min_score
        rest, rest_scores, indices = rest[strong], rest_scores[strong], indices[strong]
    return torch.tensor(kept, dtype=torch.long)


def _decay_factor(method: str, overlap: Tensor, iou_threshold: float, sigma: float) -> Tensor:
    if method == "gaussian":
        return torch.exp(-(overlap**2) / sigma)
    factor = 1 - overlap if method == "linear" else torch.zeros_like(overlap)
    return torch.where(overlap >= iou_threshold, factor, 1.0)


def _iou(box: Tensor, others: Tensor, offset: int) -> Tensor:
    """Return the IoU [N] of a box [4] with other boxes [N, 4]."""
    stretch = box.new_tensor([0, 0, offset, offset])
    return torchvision.ops.box_iou((box + stretch)[None], others + stretch)[0]


# ---------------------------------------------------------------------------------------------------------------------
# RoIAlign (arXiv:1703.06870)
# ---------------------------------------------------------------------------------------------------------------------


def _check_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError("pool_mode='max' of RoIAlign is not implemented without compiled mmcv; use 'avg'.")


def roi_align_forward(
    input_BCHW: Tensor,
    rois_N5: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write features [N, C, aligned_height, aligned_width] to `output`; a RoI is (image index, x1, y1, x2, y2)."""
    _check_average(pool_mode)
    size = (aligned_height, aligned_width)
    features, rois = _to_float(input_BCHW), _to_float(rois_N5)
    output.copy_(torchvision.ops.roi_align(features, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois_N5: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of the input to `grad_input`, [B, C, H, W]."""
    _check_average(pool_mode)
    window = (spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned)
    grad = torch.ops.torchvision._roi_align_backward(_to_float(grad_output), _to_float(rois_N5), *window)
    grad_input.copy_(grad)


# ---------------------------------------------------------------------------------------------------------------------
# Modulated deformable convolution (DCNv2, arXiv:1811.11168)
# ---------------------------------------------------------------------------------------------------------------------


def _modulated_deform_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    mask: Tensor,
    *,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> Tensor:
    """Apply torchvision's operator, which infers `group` and `deformable_group` from the shapes."""
    return torchvision.ops.deform_conv2d(
        input,
        offset,
        weight,
        bias if with_bias else None,
        stride=(stride_h, stride_w),
        padding=(pad_h, pad_w),
        dilation=(dilation_h, dilation_w),
        mask=mask,
    )


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **geometry,
) -> None:
    """Resize `output` to [B, C_out, H_out, W_out] and write the result to it."""
    result = _modulated_deform_conv(*map(_to_float, (input, weight, bias, offset, mask)), **geometry)
    output.resize_(result.shape).copy_(result)


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **geometry,
) -> None:
    """Recompute the result and write the gradients to the tensors `grad_*`, except `grad_output`."""
    arguments = [_to_float(x).detach().requires_grad_() for x in (input, weight, bias, offset, mask)]
    targets = [grad_input, grad_weight, grad_bias, grad_offset, grad_mask]
    with torch.enable_grad():
        result = _modulated_deform_conv(*arguments, with_bias=with_bias, **geometry)
    if not with_bias:
        del arguments[2], targets[2]
    for target, grad in zip(targets, torch.autograd.grad(result, arguments, _to_float(grad_output)), strict=True):
        target.copy_(grad)


# ---------------------------------------------------------------------------------------------------------------------
# Multi-scale deformable attention (arXiv:2010.04159). mmcv calls these on GPUs; on CPUs it uses its PyTorch version.
# ---------------------------------------------------------------------------------------------------------------------


def _deformable_attention(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, level_starts: Tensor, locations: Tensor, weights: Tensor, *, im2col_step: int
) -> Tensor:
    """Return [B, queries, channels] for values [B, keys, heads, channels/heads]; see mmcv for the other shapes."""
    return _deformable_attention(_to_float(value), shapes, _to_float(locations), _to_float(weights)).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    level_starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    *,
    im2col_step: int,
) -> None:
    """Recompute the result and write the gradients to the tensors `grad_*`, except `grad_output`."""
    arguments = [_to_float(x).detach().requires_grad_() for x in (value, locations, weights)]
    with torch.enable_grad():
        result = _deformable_attention(arguments[0], shapes, *arguments[1:])
    grads = torch.autograd.grad(result, arguments, _to_float(grad_output))
    for target, grad in zip((grad_value, grad_locations, grad_weights), grads, strict=True):
        target.copy_(grad)
