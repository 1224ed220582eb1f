"""Write classifiers in other formats, load them again as functions of arrays, and quantize them."""

from __future__ import annotations

import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from natzoo.checkpoints import write_atomically

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "torchscript": ".pt"}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino", "onnx", "onnxscript")}
_MAX_BATCH = 1024
_OPSET = 20  # has Gelu and LayerNormalization as single operators
Program = Callable[[np.ndarray], np.ndarray]


class Shapes(NamedTuple):
    """The images that a program takes: channels, height and width, or a range of heights and widths, in pixels."""

    channels: int
    height: int
    width: int
    least: int | None = None
    most: int | None = None

    def example(self, batch: int = 2) -> Tensor:
        """Return random images, the same in every call."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, self.channels, self.height, self.width, generator=generator)

    def dynamic(self) -> dict[int, Any]:
        """Return the dynamic axes for torch.export."""
        axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=_MAX_BATCH)}
        if self.least is not None:
            for axis, name in ((2, "height"), (3, "width")):
                axes[axis] = torch.export.Dim(name, min=self.least, max=self.most)
        return axes


def require(kind: str) -> None:
    """Raise ImportError naming the first package that a format requires and that is not installed."""
    for package in _PACKAGES.get(kind, ()):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"--format {kind} requires the package {package}; run pip install {package}.")


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write(model: nn.Module, kind: str, path: Path, shapes: Shapes) -> None:
    """Export a model in eval mode and write it.

    Args:
        model: the model, on the CPU.
        kind: one of FORMATS.
        path: the file; an existing one is replaced when the new one is complete.
        shapes: the images.

    Raises:
        ValueError: if the model does not support these images.
    """
    try:
        content = _WRITERS[kind](model, shapes)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"the model cannot be exported to {kind}: {str(error).splitlines()[0]}") from error
    if kind == "openvino":  # weights are in a second file
        _write_openvino(content, path)
    else:
        write_atomically(path, lambda file: file.write(content))


def _onnx(model: nn.Module, shapes: Shapes) -> bytes:
    program = torch.onnx.export(
        model,
        (shapes.example(),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=(shapes.dynamic(),),
        opset_version=_OPSET,
        dynamo=True,
        verbose=False,
    )
    return program.model_proto.SerializeToString()


def _torch_export(model: nn.Module, shapes: Shapes) -> bytes:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (shapes.example(),), dynamic_shapes=(shapes.dynamic(),)), file)
    return file.getvalue()


def _torchscript(model: nn.Module, shapes: Shapes) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, shapes.example()), file)
    return file.getvalue()


def _openvino(model: nn.Module, shapes: Shapes) -> Any:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(_onnx(model, shapes))
        return openvino.convert_model(path)


def _write_openvino(content: Any, path: Path) -> None:
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export.") as folder:
        complete = Path(folder, path.name)
        openvino.save_model(content, complete, compress_to_fp16=False)
        for suffix in (".bin", path.suffix):
            with complete.with_suffix(suffix).open("rb") as source:
                write_atomically(path.with_suffix(suffix), lambda file, source=source: file.write(source.read()))


_WRITERS: dict[str, Callable[[nn.Module, Shapes], Any]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch-export": _torch_export,
    "torchscript": _torchscript,
}


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load(kind: str, path: Path, threads: int) -> Program:
    """Load a program, as a function from images [B, C, H, W] to logits [B, classes], both float32."""
    if kind == "onnx":
        return _load_onnx(path, threads)
    if kind == "openvino":
        import openvino

        # Without the hint, OpenVINO computes in bfloat16 on CPUs that support it.
        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(path, "CPU", hints)
        return lambda images: compiled(images)[0]
    module = torch.export.load(path).module() if kind == "torch-export" else torch.jit.load(path)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return run


def _load_onnx(path: Path, threads: int) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


# ---------------------------------------------------------------------------------------------------------------------
# Quantization
# ---------------------------------------------------------------------------------------------------------------------


def quantize(source: Path, target: Path, images: np.ndarray) -> None:
    """Quantize convolutions and linear layers of an ONNX program to 8 bits; attention itself stays in float32.

    Ranges of activations are measured on images. Weights have a scale per channel.

    Args:
        source: the program.
        target: the file to write.
        images: preprocessed images [N, C, H, W].
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images: Iterator[np.ndarray] = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"images": image[None]}

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export.") as folder:
        prepared, complete = Path(folder, "prepared.onnx"), Path(folder, "complete.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            complete,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        content = complete.read_bytes()
    write_atomically(target, lambda file: file.write(content))
