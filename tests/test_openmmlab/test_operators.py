"""The replacement for mmcv._ext, called through mmcv.ops and compared with plain definitions."""

import importlib
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision

import natzoo.openmmlab  # noqa: F401  provides mmcv._ext

mmcv_ops = pytest.importorskip("mmcv.ops")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 4e-2, "atol": 6e-2},
}


def boxes_and_scores(count=60, seed=0):
    torch.manual_seed(seed)
    corner, size = torch.rand(count, 2) * 50, torch.rand(count, 2) * 30 + 1
    return torch.cat([corner, corner + size], 1), torch.rand(count)


def iou(a, b, offset=0):
    """Return the IoU of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    common = max(float(width), 0.0) * max(float(height), 0.0)
    areas = [float((x[2] - x[0] + offset) * (x[3] - x[1] + offset)) for x in (a, b)]
    return common / (sum(areas) - common)


def greedy_nms(boxes, scores, threshold, offset):
    order, kept = scores.argsort(descending=True).tolist(), []
    for index in order:
        if all(iou(boxes[index], boxes[other], offset) <= threshold for other in kept):
            kept.append(index)
    return kept


# ----- non-maximum suppression -----


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_nms(threshold, offset):
    boxes, scores = boxes_and_scores()
    detections, kept = mmcv_ops.nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == greedy_nms(boxes, scores, threshold, offset)
    assert torch.equal(detections, torch.cat([boxes, scores[:, None]], 1)[kept])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_nms_half_precision(dtype):
    boxes, scores = boxes_and_scores()
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    _, kept = mmcv_ops.nms(boxes, scores, 0.5)
    _, full = mmcv_ops.nms(boxes.float(), scores.float(), 0.5)
    assert kept.tolist() == full.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_nms(dtype):
    """Small integer coordinates: mmcv shifts the boxes of each class, without rounding in any dtype."""
    boxes, scores = boxes_and_scores()
    boxes = torch.cat([boxes[:, :2].div(3).floor(), boxes[:, 2:].div(3).ceil()], 1)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    classes = torch.arange(len(boxes)) % 3
    detections, kept = mmcv_ops.batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.5})
    expected = torchvision.ops.batched_nms(boxes.float(), scores.float(), classes, 0.5)
    assert len(classes.unique()) < len(kept) < len(boxes)
    assert kept.tolist() == expected.tolist()
    assert torch.equal(detections, torch.cat([boxes, scores[:, None]], 1)[kept])


def test_no_boxes():
    _, kept = mmcv_ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert len(kept) == 0
    detections, kept = mmcv_ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert len(detections) == len(kept) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("offset", [0, 1])
def test_soft_nms(method, offset, dtype):
    boxes, scores = (x.to(dtype) for x in boxes_and_scores())
    found, kept = mmcv_ops.soft_nms(boxes, scores, 0.3, sigma=0.5, min_score=0.05, method=method, offset=offset)
    left, expected = {index: float(score) for index, score in enumerate(scores) if score >= 0.05}, []
    while left:
        best = max(left, key=left.get)
        expected.append((best, left.pop(best)))
        for other in list(left):
            overlap = iou(boxes[best].float(), boxes[other].float(), offset)
            decay = math.exp(-(overlap**2) / 0.5)
            if method != "gaussian":
                decay = 1.0 if overlap < 0.3 else (1 - overlap) * (method == "linear")
            left[other] *= decay
            if left[other] < 0.05:
                del left[other]
    assert found.dtype == dtype
    assert kept.tolist() == [index for index, _ in expected]
    torch.testing.assert_close(found[:, :4], boxes[kept])
    scores = torch.tensor([score for _, score in expected])
    torch.testing.assert_close(found[:, 4].float(), scores, rtol=max(1e-4, torch.finfo(dtype).eps), atol=1e-6)


# ----- RoIAlign -----


def bilinear(map_CHW, y, x):
    """Interpolate the value at a point; it is zero more than one pixel outside the map."""
    height, width = map_CHW.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros(len(map_CHW))
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    upper = map_CHW[:, top, left] * (1 - across) + map_CHW[:, top, right] * across
    lower = map_CHW[:, bottom, left] * (1 - across) + map_CHW[:, bottom, right] * across
    return upper * (1 - down) + lower * down


def roi_align(maps, rois, size, scale, samples, aligned):
    """Average samples x samples points in each of size x size cells."""
    rows = []
    for index, *corners in rois.tolist():
        x1, y1, x2, y2 = (value * scale - 0.5 * aligned for value in corners)
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        per_cell = [samples or math.ceil(side / size) for side in (height, width)]
        cells = []
        for row in range(size):
            for column in range(size):
                ys = [y1 + height / size * (row + (i + 0.5) / per_cell[0]) for i in range(per_cell[0])]
                xs = [x1 + width / size * (column + (i + 0.5) / per_cell[1]) for i in range(per_cell[1])]
                points = [bilinear(maps[int(index)], y, x) for y in ys for x in xs]
                cells.append(torch.stack(points).mean(0))
        rows.append(torch.stack(cells, 1).unflatten(1, (size, size)))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "aligned"), [(0, True), (2, True), (2, False)])
def test_roi_align(samples, aligned, dtype):
    torch.manual_seed(1)
    maps = torch.randn(2, 3, 10, 14, requires_grad=True)
    rois = torch.tensor([[0, 3.0, 2.0, 21.0, 17.0], [1, -3.0, 5.0, 30.0, 26.0], [1, 8.0, 8.0, 9.0, 9.5]])
    grad = torch.randn(3, 3, 4, 4)
    expected = roi_align(maps, rois, 4, 0.5, samples, aligned)
    (expected_grad,) = torch.autograd.grad(expected, maps, grad)

    mine = maps.detach().to(dtype).requires_grad_()
    found = mmcv_ops.roi_align(mine, rois.to(dtype), 4, 0.5, samples, "avg", aligned)
    found.backward(grad.to(dtype))
    assert found.dtype == mine.grad.dtype == dtype
    torch.testing.assert_close(found.float(), expected.detach(), **TOLERANCE[dtype])
    torch.testing.assert_close(mine.grad.float(), expected_grad, **TOLERANCE[dtype])


def test_roi_align_with_max_pooling_is_not_implemented():
    with pytest.raises(NotImplementedError, match="pool_mode"):
        mmcv_ops.roi_align(torch.zeros(1, 1, 4, 4), torch.tensor([[0, 0, 0, 2, 2.0]]), 2, 1.0, 0, "max", True)


# ----- deformable convolution and attention -----


def modulated(x, offset, mask, weight, bias, groups):
    """3x3 convolution with padding 1 whose samples are shifted by `offset` and multiplied by `mask`."""
    height, width = x.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    columns = []
    for tap in range(9):
        parts = []
        for group, part in enumerate(x.chunk(groups, 1)):
            index = group * 9 + tap
            y = ys + tap // 3 - 1 + offset[:, 2 * index]
            z = xs + tap % 3 - 1 + offset[:, 2 * index + 1]
            grid = torch.stack([(2 * z + 1) / width - 1, (2 * y + 1) / height - 1], -1)
            parts.append(F.grid_sample(part, grid, align_corners=False) * mask[:, index, None])
        columns.append(torch.cat(parts, 1))
    taps = weight.flatten(2).permute(2, 0, 1)
    return (
        sum(torch.einsum("oc,bchw->bohw", tap, column) for tap, column in zip(taps, columns, strict=True))
        + bias[:, None, None]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_modulated_deformable_convolution(groups, dtype):
    torch.manual_seed(2)
    tensors = [
        torch.randn(2, 4, 6, 7),
        torch.randn(2, 18 * groups, 6, 7) * 0.7,
        torch.rand(2, 9 * groups, 6, 7),
        torch.randn(5, 4, 3, 3) * 0.3,
        torch.randn(5),
    ]
    grad = torch.randn(2, 5, 6, 7)
    expected_in = [x.to(dtype).float().requires_grad_() for x in tensors]
    expected = modulated(*expected_in, groups)
    expected.backward(grad)
    mine = [x.to(dtype).requires_grad_() for x in tensors]
    found = mmcv_ops.modulated_deform_conv2d(*mine, 1, 1, 1, 1, groups)
    found.backward(grad.to(dtype))
    assert found.dtype == dtype
    scale = 10 if dtype != torch.float32 else 1  # sums of many terms in half precision
    tolerance = {name: value * scale for name, value in TOLERANCE[dtype].items()}
    torch.testing.assert_close(found.float(), expected.detach(), **tolerance)
    for a, b in zip(mine, expected_in, strict=True):
        torch.testing.assert_close(a.grad.float(), b.grad, **tolerance)


def deformable_attention(value, shapes, locations, weights):
    """Return for each query the weighted sum of interpolated values."""
    batch, _, heads, channels = value.shape
    starts = [0, *torch.tensor([h * w for h, w in shapes]).cumsum(0).tolist()]
    out = torch.zeros(batch, locations.shape[1], heads, channels)
    for level, (height, width) in enumerate(shapes):
        maps = value[:, starts[level] : starts[level + 1]].unflatten(1, (height, width))
        for head in range(heads):
            grid = locations[:, :, head, level] * 2 - 1
            sampled = F.grid_sample(maps[..., head, :].permute(0, 3, 1, 2), grid, align_corners=False)
            out[:, :, head] += torch.einsum("bcqp,bqp->bqc", sampled, weights[:, :, head, level])
    return out.flatten(2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_multi_scale_deformable_attention(dtype):
    """The function that mmcv uses on GPUs, which calls the operators, and the one that it uses on CPUs."""
    from mmcv.ops.multi_scale_deform_attn import (
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )

    torch.manual_seed(3)
    shapes = [(5, 6), (3, 2)]
    tensors = [torch.randn(2, 36, 2, 4), torch.rand(2, 7, 2, 2, 3, 2), torch.rand(2, 7, 2, 2, 3)]
    grad = torch.randn(2, 7, 8)
    expected_in = [x.to(dtype).float().requires_grad_() for x in tensors]
    expected = deformable_attention(expected_in[0], shapes, *expected_in[1:])
    expected.backward(grad)
    value, locations, weights = mine = [x.to(dtype).requires_grad_() for x in tensors]
    sizes, starts = torch.tensor(shapes), torch.tensor([0, 30])
    found = MultiScaleDeformableAttnFunction.apply(value, sizes, starts, locations, weights, 64)
    found.backward(grad.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.detach(), **TOLERANCE[dtype])
    for a, b in zip(mine, expected_in, strict=True):
        scale = b.grad.abs().max().item()
        torch.testing.assert_close(a.grad.float() / scale, b.grad / scale, **TOLERANCE[dtype])
    if dtype == torch.float32:
        theirs = multi_scale_deformable_attn_pytorch(value, sizes, locations, weights)
        torch.testing.assert_close(theirs, expected)


# ----- modules that are not installed -----


def test_other_operators_raise_when_called():
    with pytest.raises(NotImplementedError, match="carafe_forward"):
        sys.modules["mmcv._ext"].carafe_forward()


@pytest.mark.parametrize("name", ["mmcv._ext", "panopticapi.utils"])
def test_installed_module_takes_precedence(tmp_path, name):
    package, module = name.split(".")
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / package / f"{module}.py").write_text("installed = True")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import natzoo.openmmlab, {name}; {name}.installed"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_names_missing_packages(monkeypatch):
    find = importlib.util.find_spec
    missing = ("mmdet", "mmseg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a))
    monkeypatch.delitem(sys.modules, "natzoo.openmmlab")
    with pytest.raises(ImportError, match="mmdet, mmseg"):
        importlib.import_module("natzoo.openmmlab")
