"""Complete models with torch.compile (no graph breaks), torch.export, ONNX and bfloat16."""

from __future__ import annotations

import shutil

import onnxruntime
import pytest
import timm
import torch
from small_models import SMALL, small
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import natzoo  # noqa: F401  registers the models

# One model per family with two blocks; all models at full depth take an hour.
_STAGES = {"depths": (1, 1), "num_heads": (2, 4)}
SHALLOW = {
    "nat_mini": _STAGES,
    "dinat_mini": {**_STAGES, "dilations": ([2], [1])},
    "dinat_s_tiny": {**_STAGES, "dilations": ([2], [1])},
    "dinat_isotropic_small": {"depth": 2, "dilations": (1, 2)},
    "vitrpb_small": {"depth": 2},
}
NAMES = timm.list_models(["nat_*", "dinat_*", "vitrpb_*"])
MODELS = [
    *(pytest.param(name, kwargs, id=f"shallow {name}") for name, kwargs in SHALLOW.items()),
    *(pytest.param(name, {}, id=name, marks=pytest.mark.slow) for name in NAMES),
]
HAS_COMPILER = shutil.which("c++") is not None or shutil.which("g++") is not None
SIDES = {axis: torch.export.Dim(name, min=32, max=256) for axis, name in ((2, "height"), (3, "width"))}
BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)


def make(name: str, kwargs: dict) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **kwargs).eval().requires_grad_(False)


def random_images(batch: int, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.01  # otherwise the comparison proves nothing
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def reset_compiler():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_compiled_without_graph_breaks(name, kwargs):
    """fullgraph=True turns graph breaks into errors; five batch sizes cause at most three compilations."""
    model, counter = make(name, kwargs), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (4, 2, 7, 3, 1):
        assert_near(compiled(random_images(batch)), model(random_images(batch)))
    assert 1 <= counter.frame_count <= 1 + 2


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
def test_inductor():
    model = make("dinat_mini", SHALLOW["dinat_mini"])
    assert_near(torch.compile(model, fullgraph=True)(random_images(2)), model(random_images(2)))


@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_bfloat16_autocast(name, kwargs):
    model, x = make(name, kwargs), random_images(2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    expected = model(x)
    assert (logits - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_export_and_load(name, kwargs, tmp_path):
    model = make(name, kwargs)
    torch.export.save(torch.export.export(model, (random_images(2),), dynamic_shapes=BATCH), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (2, 3, 1):
        assert_near(loaded(random_images(batch)), model(random_images(batch)))


@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_export_with_dynamic_sizes(name, kwargs):
    model = make(name, kwargs)
    exported = torch.export.export(model, (random_images(1),), dynamic_shapes=(SIDES,)).module()
    for size in ((64, 64), (32, 77), (256, 33), (130, 96)):
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        assert_near(exported(x), model(x))


@pytest.mark.parametrize(
    "name", ["dinat_mini", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dinat_s_tiny", "vitrpb_small"))]
)
def test_onnx_with_dynamic_sizes(name, tmp_path):
    model = make(name, SHALLOW[name])
    program = torch.onnx.export(model, (random_images(1),), dynamo=True, verbose=False, dynamic_shapes=(SIDES,))
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in ((64, 64), (32, 77), (130, 96)):
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_near(torch.from_numpy(logits), model(x))


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        pytest.param("dinat_mini", SHALLOW["dinat_mini"], 64, id="shallow dinat_mini"),
        pytest.param("nat_mini", {}, 224, id="nat_mini", marks=pytest.mark.slow),
        pytest.param("dinat_mini", {}, 224, id="dinat_mini", marks=pytest.mark.slow),
    ],
)
def test_onnx(name, kwargs, size, tmp_path):
    """ONNX Runtime returns the same logits, also for other batch sizes."""
    model = make(name, kwargs)
    program = torch.onnx.export(model, (random_images(2, size),), dynamo=True, verbose=False, dynamic_shapes=BATCH)
    assert {node.domain for node in program.model_proto.graph.node} <= {"", "pkg.onnxscript.torch_lib"}
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    for batch in (2, 3, 1):
        x = random_images(batch, size)
        (logits,) = session.run(None, {images.name: x.numpy()})
        assert_near(torch.from_numpy(logits), model(x))


_SLOW = pytest.mark.slow


# The exporter of torch.export writes at least opset 18; exporting for any size takes 15 to 60 s.
@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=_SLOW)], ids=["TorchScript", "torch.export"])
@pytest.mark.parametrize("name", SMALL)
def test_onnx_exporters(name, dynamo, opset, tmp_path):
    """Both exporters of PyTorch, with any batch size; torch.export also with any image size.

    timm's export script calls either.
    """
    model, path = small(name).requires_grad_(False), tmp_path / "model.onnx"
    shapes = {"dynamic_axes": {"images": {0: "batch"}}}
    if dynamo:
        shapes = {"dynamic_shapes": ({**BATCH[0], **SIDES},)}
    options = {"input_names": ["images"], "opset_version": opset, "dynamo": dynamo, "verbose": False}
    torch.onnx.export(model, (random_images(2, 48),), path, **options, **shapes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, size in ((2, 48), (3, 48), (1, 80 if dynamo else 48)):
        x = random_images(batch, size)
        (logits,) = session.run(None, {"images": x.numpy()})
        assert_near(torch.from_numpy(logits), model(x))
