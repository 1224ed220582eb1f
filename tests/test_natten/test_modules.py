"""The layers: parameters, arguments, padding, dropout, autocast, copies and serialization."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import unittest
from pathlib import Path

import torch
import torch.nn.functional as F
from deterministic import array, fill
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natten
from test_natten.problems import RANKS, function

CLASSES = {rank: getattr(natten, f"NeighborhoodAttention{rank}D") for rank in RANKS}
MAPS = {1: (9,), 2: (7, 8), 3: (4, 5, 6)}
GOLDENS = Path(__file__).parents[1] / "goldens"


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return a normally distributed tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module) -> nn.Module:
    """Return the layer with parameters that depend only on their names."""
    fill(module)
    return module


def step_by_step(module: nn.Module, x: Tensor) -> Tensor:
    """Compute the layer step by step: pad, project, attend, crop, project."""
    space = x.shape[1:-1]
    padded = x
    for axis, (k, d) in enumerate(zip(module.kernel_size, module.dilation, strict=True), start=1):
        zeros = torch.zeros_like(padded.narrow(axis, 0, 1))
        for _ in range(k * d - x.shape[axis]):
            padded = torch.cat((padded, zeros), dim=axis)
    qkv = F.linear(padded, module.qkv.weight, module.qkv.bias)
    q, k, v = (part.unflatten(-1, (module.num_heads, -1)) for part in qkv.chunk(3, dim=-1))
    window = module.kernel_size, module.stride, module.dilation, module.is_causal
    out = function(len(space))(q, k, v, *window, scale=module.scale, rpb=module.rpb).flatten(-2)
    out = out[tuple(slice(length) for length in (len(x), *space))]
    return F.linear(out, module.proj.weight, module.proj.bias)


class Wrapper(nn.Module):
    """Replaces a layer, without its attributes, as wrappers for quantization or adapters do."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.wrapped = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x)


class ParametersTest(unittest.TestCase):
    """Names and shapes of parameters, and the arguments that determine them."""

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(x.shape) for name, x in module.state_dict().items()}

    def test_names_and_shapes(self):
        for rank, make in CLASSES.items():
            for arguments in ((12, 3, 5), (12, 3, 5, 2)):
                expected = {
                    "rpb": (3, *(9,) * rank),
                    "qkv.weight": (36, 12),
                    "qkv.bias": (36,),
                    "proj.weight": (12, 12),
                    "proj.bias": (12,),
                }
                self.assertEqual(self.shapes(make(*arguments)), expected)

    def test_unknown_argument(self):
        with self.assertRaisesRegex(TypeError, "NeighborhoodAttention.*dilations"):
            natten.NeighborhoodAttention2D(32, 2, 3, dilations=2)

    def test_per_axis_arguments(self):
        module = natten.NeighborhoodAttention3D(
            8, 2, (2, 3, 4), (3, 1, 2), stride=(1, 3, 2), is_causal=(True, False, False)
        )
        self.assertEqual(tuple(module.rpb.shape), (2, 3, 5, 7))
        x = random(1, 6, 5, 9, 8)
        torch.testing.assert_close(filled(module)(x), step_by_step(module, x))

    def test_lists_are_accepted(self):
        self.assertEqual(tuple(natten.NeighborhoodAttention2D(8, 2, [3, 5], [1, 2]).rpb.shape), (2, 5, 9))

    def test_no_qkv_bias(self):
        self.assertNotIn("qkv.bias", self.shapes(natten.NeighborhoodAttention2D(8, 2, 3, qkv_bias=False)))

    def test_rpb_is_on_by_default(self):
        for make in CLASSES.values():
            self.assertIsNotNone(make(8, 2, 3).rpb)
            self.assertIsNotNone(make(dim=8, num_heads=2, kernel_size=3).rpb)
            for name in ("bias", "rel_pos_bias"):
                self.assertIsNone(make(8, 2, 3, **{name: False}).rpb)
            self.assertNotIn("rpb", make(8, 2, 3, bias=False).state_dict())

    def test_rpb_is_off_by_default_with_embed_dim(self):
        for make in CLASSES.values():
            arguments = {"embed_dim": 8, "num_heads": 2, "kernel_size": 3}
            self.assertIsNone(make(**arguments).rpb)
            for name in ("bias", "rel_pos_bias"):
                self.assertIsNotNone(make(**arguments, **{name: True}).rpb)

    def test_bias_and_rel_pos_bias_may_agree(self):
        self.assertIsNone(natten.NeighborhoodAttention2D(8, 2, 3, bias=False, rel_pos_bias=False).rpb)

    def test_dilation_none_is_one(self):
        self.assertEqual(natten.NeighborhoodAttention2D(8, 2, 3, dilation=None).dilation, (1, 1))

    def test_rpb_initialization(self):
        rpb = natten.NeighborhoodAttention2D(64, 8, 13).rpb
        self.assertAlmostEqual(rpb.std().item(), 0.02, delta=0.005)
        self.assertTrue(rpb.requires_grad)

    def test_nat_state_dict_loads_strictly(self):
        shapes = json.loads((GOLDENS / "state_dicts.json").read_text())["nat_mini"]
        prefix = "levels.0.blocks.0.attn."
        state = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        self.assertEqual(len(state), 5)
        module = natten.NeighborhoodAttention2D(64, 2, 7)
        module.load_state_dict({name: torch.from_numpy(array(name, shape, 1.0)) for name, shape in state.items()})
        torch.testing.assert_close(module.rpb.detach(), torch.from_numpy(array("rpb", (2, 13, 13), 1.0)))

    def test_repr_shows_the_arguments(self):
        text = repr(natten.NeighborhoodAttention2D(8, 2, (3, 5), 2, stride=2, is_causal=(True, False)))
        for part in ("NeighborhoodAttention2D", "num_heads=2", "(3, 5)", "dilation=2", "stride=2", "(True, False)"):
            self.assertIn(part, text)

    def test_meta_device_and_dtype(self):
        for rank, make in CLASSES.items():
            module = make(8, 2, 3, device="meta", dtype=torch.bfloat16)
            self.assertEqual({(x.device.type, x.dtype) for x in module.parameters()}, {("meta", torch.bfloat16)})
            module = module.to_empty(device="cpu")
            module.reset_parameters()
            self.assertEqual(module(random(1, *MAPS[rank], 8).bfloat16()).dtype, torch.bfloat16)

    def test_forward_on_meta(self):
        module = natten.NeighborhoodAttention2D(8, 2, 3, device="meta")
        self.assertEqual(module(torch.empty(2, 7, 2, 8, device="meta")).shape, (2, 7, 2, 8))


class ForwardTest(unittest.TestCase):
    """Outputs and gradients."""

    def test_equals_the_steps(self):
        for rank, make in CLASSES.items():
            for arguments in ({}, {"is_causal": True}, {"stride": 2}, {"qk_scale": 0.1}, {"bias": False}):
                with self.subTest(rank=rank, **arguments):
                    module = filled(make(8, 2, 3, **arguments))
                    x = random(2, *MAPS[rank], 8)
                    torch.testing.assert_close(module(x), step_by_step(module, x))

    def test_small_maps_are_padded_with_zeros_and_cropped(self):
        for space, kernel_size, dilation in (
            ((1,), 3, 1),
            ((5,), 3, 4),
            ((7, 4), 7, 1),
            ((4, 20), 3, (4, 2)),
            ((5, 3), (7, 2), (1, 3)),
            ((1, 1), 2, 1),
            ((2, 9, 3), (3, 3, 2), (1, 2, 4)),
        ):
            with self.subTest(space=space, kernel_size=kernel_size, dilation=dilation):
                module = filled(CLASSES[len(space)](8, 2, kernel_size, dilation))
                x = random(2, *space, 8)
                self.assertEqual(module(x).shape, x.shape)
                torch.testing.assert_close(module(x), step_by_step(module, x))

    def test_windows_include_the_padding(self):
        module = filled(natten.NeighborhoodAttention1D(8, 2, 5))
        x = random(1, 3, 8)
        alone = filled(natten.NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=False))
        self.assertFalse(torch.allclose(module(x), alone(x), atol=1e-3))

    def test_gradients_of_a_padded_map(self):
        module = filled(natten.NeighborhoodAttention2D(8, 2, 5))
        x = random(2, 6, 3, 8).requires_grad_()
        wanted = [x, *module.parameters()]
        grad_out = random(2, 6, 3, 8, seed=1)
        found = torch.autograd.grad(module(x), wanted, grad_out)
        torch.testing.assert_close(found, torch.autograd.grad(step_by_step(module, x), wanted, grad_out))

    def test_backends_agree(self):
        for rank, make in CLASSES.items():
            module, plain = filled(make(8, 2, 3)), filled(make(8, 2, 3, backend="reference"))
            x = random(2, *MAPS[rank], 8)
            torch.testing.assert_close(module(x), plain(x))

    def test_empty_batch(self):
        for rank, make in CLASSES.items():
            for space in (MAPS[rank], (2,) * rank):
                module = make(8, 2, 3)
                x = torch.empty(0, *space, 8, requires_grad=True)
                module(x).sum().backward()
                self.assertEqual(x.grad.shape, x.shape)
                self.assertEqual(module.rpb.grad.abs().max().item(), 0.0)

    def test_inputs_of_any_strides(self):
        module = filled(natten.NeighborhoodAttention2D(8, 2, 3))
        x = random(2, 7, 8, 8)
        expected = module(x)
        channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        every_other = x.repeat_interleave(2, dim=2)[:, :, ::2]
        for name, y in {"channels first": channels_first, "every other": every_other}.items():
            with self.subTest(name):
                self.assertFalse(y.is_contiguous())
                torch.testing.assert_close(module(y), expected)
        one = x[:1].expand(3, -1, -1, -1)
        torch.testing.assert_close(module(one), expected[:1].expand(3, -1, -1, -1))

    def test_activation_checkpointing(self):
        module = filled(natten.NeighborhoodAttention2D(8, 2, 3))
        x = random(2, 7, 8, 8).requires_grad_()
        again = checkpoint(module, x, use_reentrant=False)
        found = torch.autograd.grad(again.sum(), [x, *module.parameters()])
        torch.testing.assert_close(found, torch.autograd.grad(module(x).sum(), [x, *module.parameters()]))


class AttentionWeightsTest(unittest.TestCase):
    """`attention_weights` returns the weights of the forward pass."""

    def test_weights_sum_to_one_and_produce_the_output(self):
        for rank, make in CLASSES.items():
            for arguments in ({}, {"is_causal": True}, {"attn_drop": 0.5}, {"bias": False, "qk_scale": 0.3}):
                with self.subTest(rank=rank, **arguments):
                    module = filled(make(8, 2, 3, **arguments))
                    x = random(2, *MAPS[rank], 8)
                    weights = module.attention_weights(x)
                    self.assertEqual(weights.shape, (2, 2, *MAPS[rank], 3**rank))
                    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, *MAPS[rank]))
                    value = module.qkv(x).chunk(3, dim=-1)[2].unflatten(-1, (2, 4)).movedim(-2, 1)
                    out = function(rank, "_av")(weights, value, 3, is_causal=module.is_causal).movedim(1, -2)
                    torch.testing.assert_close(module.proj(out.flatten(-2)), module.eval()(x))

    def test_small_maps_are_padded(self):
        module = filled(natten.NeighborhoodAttention2D(8, 2, 3, 2))
        self.assertEqual(module.attention_weights(random(1, 4, 9, 8)).shape, (1, 2, 6, 9, 9))

    def test_stride_is_not_supported(self):
        with self.assertRaisesRegex(ValueError, "stride"):
            natten.NeighborhoodAttention2D(8, 2, 3, stride=2).attention_weights(random(1, 7, 8, 8))


class DropoutTest(unittest.TestCase):
    """Dropout on the attention weights and on the output."""

    def setUp(self):
        torch.manual_seed(0)

    def test_attention_dropout_is_off_in_eval(self):
        module = filled(natten.NeighborhoodAttention2D(8, 2, 3, attn_drop=0.5)).eval()
        plain = filled(natten.NeighborhoodAttention2D(8, 2, 3)).eval()
        x = random(2, 7, 8, 8)
        torch.testing.assert_close(module(x), plain(x))

    def test_unfused_path_equals_the_fused_path(self):
        for rank, make in CLASSES.items():
            for arguments in ({}, {"is_causal": True}, {"dilation": 2}, {"bias": False}, {"qk_scale": 0.3}):
                with self.subTest(rank=rank, **arguments):
                    # The rate is too small to drop anything, but selects the unfused path.
                    module = filled(make(8, 2, 3, attn_drop=1e-9, **arguments))
                    x = random(2, *MAPS[rank], 8).requires_grad_()
                    wanted = [x, *module.parameters()]
                    trained, evaluated = module.train()(x), module.eval()(x)
                    torch.testing.assert_close(trained, evaluated)
                    found, expected = (torch.autograd.grad(out.square().sum(), wanted) for out in (trained, evaluated))
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_attention_dropout_keeps_the_mean(self):
        module = filled(natten.NeighborhoodAttention1D(8, 2, 3, attn_drop=0.4))
        x = random(1, 5, 8)
        with torch.no_grad():
            many = module.train()(x.expand(4000, -1, -1))
            expected = module.eval()(x)[0]
        error = (many.mean(0) - expected).abs()
        self.assertGreater(many.std(0).min().item(), 0.01)
        self.assertTrue((error < 5 * many.std(0) / 4000**0.5).all())

    def test_output_dropout(self):
        module = filled(natten.NeighborhoodAttention2D(8, 2, 3, proj_drop=0.5))
        x = random(2, 7, 8, 8)
        trained, evaluated = module.train()(x), module.eval()(x)
        dropped = trained == 0
        self.assertAlmostEqual(dropped.float().mean().item(), 0.5, delta=0.1)
        torch.testing.assert_close(trained[~dropped], 2 * evaluated[~dropped])


class PrecisionTest(unittest.TestCase):
    """Autocast and layers in half precision."""

    def test_autocast(self):
        for dtype in (torch.bfloat16, torch.float16):
            for arguments in ({}, {"attn_drop": 1e-9}, {"backend": "reference"}):
                with self.subTest(dtype=dtype, **arguments):
                    module = filled(natten.NeighborhoodAttention2D(8, 2, 3, **arguments))
                    x = random(2, 7, 8, 8)
                    with torch.autocast("cpu", dtype):
                        out = module(x)
                    out.float().square().sum().backward()
                    self.assertEqual(out.dtype, dtype)
                    self.assertEqual((module.rpb.dtype, module.rpb.grad.dtype), (torch.float32, torch.float32))
                    torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)

    def test_fused_functions_cast_their_inputs_but_not_rpb(self):
        q, k, v = random(3, 2, 7, 8, 2, 4).requires_grad_().unbind()
        rpb = random(2, 5, 5).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out, lse = natten.na2d(q, k, v, 3, rpb=rpb, return_lse=True)
            packed = natten.na2d_qkvpacked(torch.stack((q, k, v), dim=-3), 3, rpb=rpb)
        half = torch.bfloat16
        self.assertEqual([x.dtype for x in (out, lse, packed)], [half, torch.float32, half])
        grads = torch.autograd.grad(out.float().sum(), (q, k, v, rpb), allow_unused=True)
        self.assertEqual({x.dtype for x in grads}, {torch.float32})
        torch.testing.assert_close(packed, out, rtol=0, atol=0)

    def test_inputs_may_differ_in_dtype_under_autocast(self):
        q, k, v = random(3, 2, 7, 8, 2, 4).unbind()
        with torch.autocast("cpu", torch.bfloat16):
            expected = natten.na2d(q, k, v, 3)
            found = natten.na2d(q, k.bfloat16(), v.bfloat16(), 3)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_autocast_keeps_float64(self):
        module = natten.NeighborhoodAttention1D(8, 2, 3).double()
        self.assertEqual(module(random(1, 9, 8).double()).dtype, torch.float64)
        q, k, v = random(3, 1, 9, 2, 4).double()
        with torch.autocast("cpu", torch.bfloat16):
            self.assertEqual(natten.na1d(q, k, v, 3).dtype, torch.float64)

    def test_layer_in_bfloat16(self):
        module = filled(natten.NeighborhoodAttention2D(8, 2, 3))
        x = random(2, 7, 8, 8)
        expected = module(x)
        found = copy.deepcopy(module).bfloat16()(x.bfloat16())
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


class CopyTest(unittest.TestCase):
    """Layers can be saved, copied and pickled."""

    def assert_same(self, module: nn.Module, other: nn.Module) -> None:
        x = random(2, *MAPS[module.rank], 8)
        self.assertIs(type(other), type(module))
        torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)

    def test_state_dict(self):
        for make in CLASSES.values():
            module, other = make(8, 2, 3), make(8, 2, 3)
            other.load_state_dict(module.state_dict(), strict=True)
            self.assert_same(module, other)

    def test_deepcopy_and_pickle(self):
        for make in CLASSES.values():
            module = make(8, 2, 3, 1, is_causal=True)
            self.assert_same(module, copy.deepcopy(module))
            self.assert_same(module, pickle.loads(pickle.dumps(module)))

    def test_torch_save(self):
        module, file = natten.NeighborhoodAttention2D(8, 2, 3), io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        with torch.serialization.safe_globals([type(module), torch.nn.Linear, torch.nn.Dropout, set]):
            self.assert_same(module, torch.load(file, weights_only=True))

    def test_names_types_and_documentation(self):
        for rank, make in CLASSES.items():
            self.assertEqual(make.__name__, f"NeighborhoodAttention{rank}D")
            self.assertIn("num_heads", make.__doc__)
            for suffix in ("", "_qkvpacked", "_qk", "_av"):
                attend = function(rank, suffix)
                self.assertEqual(attend.__name__, f"na{rank}d{suffix}")
                self.assertIn("Returns:", attend.__doc__)
                parameters = inspect.signature(attend).parameters
                self.assertEqual({*parameters, "return"}, set(attend.__annotations__))


class WrappedLayersTest(unittest.TestCase):
    """Projections that are replaced after construction."""

    def test_wrapped_projections(self):
        for rank, cls in CLASSES.items():
            module, x = filled(cls(8, 2, 3)), random(2, *MAPS[rank], 8)
            expected = module(x)
            module.qkv, module.proj = Wrapper(module.qkv), Wrapper(module.proj)
            torch.testing.assert_close(module(x), expected)
            with self.assertRaisesRegex(ValueError, "8 channels"):
                module(x[..., :4])
