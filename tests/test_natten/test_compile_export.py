"""torch.compile without graph breaks; torch.export and ONNX without natten operators."""

from __future__ import annotations

import shutil
import tempfile
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import natten

BACKENDS = (None, "reference")
SIZES = {1: (13,), 2: (9, 10), 3: (4, 5, 6)}
HAS_COMPILER = shutil.which("c++") is not None or shutil.which("g++") is not None


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return a normally distributed tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(rank: int, **arguments) -> nn.Module:
    """Return a layer with 2 heads and 8 channels, dilated on the first axis."""
    torch.manual_seed(0)
    arguments = {"kernel_size": 3, "dilation": (2, 1, 1)[:rank], **arguments}
    return getattr(natten, f"NeighborhoodAttention{rank}D")(8, 2, **arguments)


class Unfused(nn.Module):
    """Attention with na2d_qk and na2d_av."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = natten.na2d_qk(q, k, 3, is_causal=(True, False)).softmax(-1)
        return natten.na2d_av(weights, v, 3, is_causal=(True, False))


def names_of_operators(graph_module: torch.fx.GraphModule) -> list[str]:
    """Return the names of all operators in a graph and its subgraphs."""
    graphs = [module.graph for module in graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return [str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"]


def results(function: Callable, inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return the output of a function, and the gradients of inputs and parameters."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, [*inputs, *parameters], random(*out.shape, seed=1))]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class CompileTest(unittest.TestCase):
    """torch.compile with fullgraph=True, which raises at a graph break."""

    def setUp(self):
        self.addCleanup(torch.compiler.reset)

    def compare(
        self, function: Callable, inputs: Sequence[Tensor], parameters: Sequence[Tensor] = (), **options
    ) -> None:
        """Compare output and gradients of the compiled and the eager function."""
        torch.compiler.reset()  # otherwise the layers of other cases, which share their code, count as recompilations
        compiled = torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})
        expected = results(function, inputs, parameters)
        assert_near(results(compiled, inputs, parameters), expected)

    def test_functions(self):
        qkv, rpb = random(3, 2, 9, 10, 2, 4).unbind(), random(2, 5, 5)
        for backend in BACKENDS:
            with self.subTest(backend=backend):
                window = {"kernel_size": 3, "dilation": (2, 1), "backend": backend}
                self.compare(lambda q, k, v, rpb, window=window: natten.na2d(q, k, v, rpb=rpb, **window), (*qkv, rpb))
                packed = torch.stack(qkv, dim=-3)
                self.compare(lambda x, rpb, window=window: natten.na2d_qkvpacked(x, rpb=rpb, **window), (packed, rpb))

    def test_output_and_logsumexp(self):
        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = natten.na1d(q, k, v, 4, stride=2, return_lse=True)
            return out.sin().sum(-1) + lse

        self.compare(loss, random(3, 2, 9, 2, 4).unbind())

    def test_unfused(self):
        self.compare(Unfused(), random(3, 2, 2, 5, 6, 4).unbind())

    def test_layers(self):
        for rank, size in SIZES.items():
            for space, backend in ((size, None), (size, "reference"), ((3, *size[1:]), None)):  # the last map is padded
                with self.subTest(rank=rank, backend=backend, space=space):
                    module = layer(rank, backend=backend)
                    self.compare(module, [random(2, *space, 8)], list(module.parameters()))

    def test_layer_with_attention_dropout(self):
        module = layer(2, attn_drop=1e-9)  # too small to drop anything, but selects the unfused path
        self.compare(module, [random(2, *SIZES[2], 8)], list(module.parameters()))

    @unittest.skipUnless(HAS_COMPILER, "inductor needs a C++ compiler")
    def test_layers_with_inductor(self):
        for backend in BACKENDS:
            with self.subTest(backend=backend):
                module = layer(2, backend=backend)
                self.compare(module, [random(2, *SIZES[2], 8)], list(module.parameters()), backend="inductor")

    def test_batch_sizes_recompile_at_most_twice(self):
        for rank, size in SIZES.items():
            with self.subTest(rank=rank):
                torch.compiler.reset()
                counter = CompileCounterWithBackend("aot_eager")
                module = layer(rank)
                compiled = torch.compile(module, fullgraph=True, backend=counter)
                for batch in (4, 2, 7, 3, 5):
                    x = random(batch, *size, 8)
                    assert_near([compiled(x)], [module(x)])
                self.assertLessEqual(counter.frame_count, 1 + 2)

    def test_map_sizes_recompile_at_most_twice(self):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        module = layer(2)
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for height, width in ((9, 10), (11, 12), (13, 8), (16, 16), (20, 9)):
            x = random(2, height, width, 8)
            assert_near([compiled(x)], [module(x)])
        self.assertLessEqual(counter.frame_count, 1 + 2)

    @unittest.skipUnless(HAS_COMPILER, "inductor needs a C++ compiler")
    @pytest.mark.slow
    def test_dynamic_sizes_with_inductor(self):
        """Layers between strided and transposed convolutions, as in a U-Net."""
        torch.manual_seed(0)
        down, up = nn.Conv2d(3, 8, 4, 2, 1), nn.ConvTranspose2d(8, 3, 2, 2)
        attention = layer(2, kernel_size=3, dilation=2)

        def network(x: Tensor) -> Tensor:
            x = down(x)
            x = x + attention(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return up(x)

        compiled = torch.compile(network, dynamic=True)
        parameters = [p for module in (down, up, attention) for p in module.parameters()]
        for size in ((1, 3, 32, 32), (2, 3, 48, 32), (1, 3, 16, 24)):
            x = random(*size)
            assert_near(results(compiled, [x], parameters), results(network, [x], parameters), tolerance=1e-3)

    def test_use_backend_around_compiled_code(self):
        graphs = []

        def collect(graph_module: torch.fx.GraphModule, inputs: list) -> Callable:
            graphs.append(names_of_operators(graph_module))
            return graph_module

        module = layer(2).eval().requires_grad_(False)
        compiled = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=collect))
        x = random(2, 9, 10, 8)
        expected = compiled(x)
        with natten.use_backend("reference"):
            assert_near([compiled(x)], [expected])
        assert_near([compiled(x)], [expected])
        uses_operator = [any("natten" in name for name in names) for names in graphs]
        self.assertEqual(uses_operator, [True, False])

    def test_use_backend_inside_compiled_code(self):
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with natten.use_backend("reference"):
                return natten.na1d(q, k, v, 3)

        self.compare(attend, random(3, 2, 9, 2, 4).unbind())

    def test_autocast(self):
        module = layer(2)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = random(2, 9, 10, 8)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = module(x), compiled(x)
        self.assertEqual(found.dtype, torch.bfloat16)
        assert_near([found], [expected], tolerance=2**-6)


class ExportTest(unittest.TestCase):
    """Exported programs run without natten."""

    def test_program_has_no_natten_operators(self):
        for rank, size in SIZES.items():
            with self.subTest(rank=rank):
                module, x = layer(rank).eval(), random(2, *size, 8)
                program = torch.export.export(module, (x,))
                names = names_of_operators(program.graph_module)
                self.assertTrue(names)
                self.assertEqual([name for name in names if "natten" in name], [])
                assert_near([program.module()(x)], [module(x)])

    def test_use_backend_during_export(self):
        module, x = layer(2).eval(), random(2, 9, 10, 8)
        with natten.use_backend("reference"):
            program = torch.export.export(module, (x,))
        assert_near([program.module()(x)], [module(x)])

    def test_dynamic_batch(self):
        for rank, size in SIZES.items():
            with self.subTest(rank=rank):
                module = layer(rank).eval()
                batch = {0: torch.export.Dim("batch", min=1, max=64)}
                program = torch.export.export(module, (random(2, *size, 8),), dynamic_shapes=(batch,))
                for count in (1, 3, 8):
                    x = random(count, *size, 8)
                    assert_near([program.module()(x)], [module(x)])

    def test_dynamic_sizes(self):
        sides = {axis: torch.export.Dim(name, min=8, max=64) for axis, name in ((1, "height"), (2, "width"))}
        for arguments in ({}, {"kernel_size": 7, "dilation": 3}, {"stride": 2}, {"is_causal": True}):  # 7 * 3 > 8
            with self.subTest(arguments=arguments):
                module = layer(2, **arguments).eval()
                program = torch.export.export(module, (random(2, 24, 16, 8),), dynamic_shapes=(sides,))
                for size in ((24, 16), (8, 64), (21, 9)):
                    x = random(2, *size, 8)
                    assert_near([program.module()(x)], [module(x)])

    def test_padded_map(self):
        module, x = layer(2, kernel_size=7).eval(), random(2, 9, 6, 8)
        assert_near([torch.export.export(module, (x,)).module()(x)], [module(x)])

    def test_unfused(self):
        module, inputs = Unfused(), tuple(random(3, 2, 2, 5, 6, 4).unbind())
        assert_near([torch.export.export(module, inputs).module()(*inputs)], [module(*inputs)])

    def test_save_and_load(self):
        module, x = layer(2).eval(), random(2, 9, 10, 8)
        with tempfile.TemporaryDirectory() as folder:
            torch.export.save(torch.export.export(module, (x,)), Path(folder) / "layer.pt2")
            program = torch.export.load(Path(folder) / "layer.pt2")
        assert_near([program.module()(x)], [module(x)])


class OnnxTest(unittest.TestCase):
    """ONNX, run by ONNX Runtime."""

    def run_onnx(self, module: nn.Module, example: Tensor, x: Tensor, **options) -> Tensor:
        """Export with the example, and run on x."""
        program = torch.onnx.export(module, (example,), dynamo=True, verbose=False, **options)
        domains = {node.domain for node in program.model_proto.graph.node}
        self.assertFalse(any("natten" in domain for domain in domains))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.onnx"
            program.save(path)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(out)

    def test_layer(self):
        module, x = layer(2).eval(), random(2, 9, 10, 8)
        assert_near([self.run_onnx(module, x, x)], [module(x).detach()])

    def test_padded_causal_layer_without_bias(self):
        module = layer(2, kernel_size=(7, 3), is_causal=(True, False), rel_pos_bias=False).eval()
        x = random(2, 9, 6, 8)
        assert_near([self.run_onnx(module, x, x)], [module(x).detach()])

    def test_dynamic_batch(self):
        module, x = layer(2).eval(), random(5, 9, 10, 8)
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        assert_near([self.run_onnx(module, x[:2], x, dynamic_shapes=(batch,))], [module(x).detach()])

    def test_torchscript_exporter(self):
        """With any batch size; 9 is not a multiple of the dilation."""
        module, x = layer(2).eval(), random(5, 9, 10, 8)
        for opset in (17, 20):
            with self.subTest(opset=opset), tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "layer.onnx"
                options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}, "opset_version": opset}
                torch.onnx.export(module, (x[:2],), path, dynamo=False, **options)
                session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                (out,) = session.run(None, {"x": x.numpy()})
                assert_near([torch.from_numpy(out)], [module(x).detach()])

    def test_torchscript_exporter_knows_one_size(self):
        """The program fails on maps of another size, although their axes are declared as dynamic."""
        module = layer(2).eval()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.onnx"
            options = {"input_names": ["x"], "dynamic_axes": {"x": {1: "height", 2: "width"}}}
            torch.onnx.export(module, (random(1, 9, 10, 8),), path, dynamo=False, **options)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            session.run(None, {"x": random(1, 9, 10, 8).numpy()})
            for height, width in ((18, 20), (9, 12), (8, 10), (1, 10)):
                with self.assertRaises(Exception):  # noqa: B017  it depends on the release of onnxruntime
                    session.run(None, {"x": random(1, height, width, 8).numpy()})
