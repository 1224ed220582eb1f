"""LeanMlp, compared with timm's Mlp: the same results and calls, with less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from natzoo.models._layers import LeanMlp

PARTS = ("fc1", "act", "drop1", "norm", "fc2", "drop2")


def pair(**kwargs) -> tuple[Mlp, Mlp]:
    """Return a LeanMlp and a timm Mlp with the same weights."""
    torch.manual_seed(0)
    lean, plain = LeanMlp(16, 48, **kwargs), Mlp(16, 48, **kwargs)
    plain.load_state_dict(lean.state_dict())
    return lean, plain


def images() -> Tensor:
    return torch.randn(2, 5, 7, 16, generator=torch.Generator().manual_seed(1))


def results(mlp: Callable, parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    """Return the output and the gradients of x and the parameters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    out = mlp(x)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *parameters])]


def trainable(mlp: nn.Module) -> list[Tensor]:
    return [parameter for parameter in mlp.parameters() if parameter.requires_grad]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert y.abs().max() > 0
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ----- memory -----


def is_stored(part: nn.Module, run: Callable) -> bool:
    """Return whether the output of a layer is in memory after `run`, and run the backward pass."""
    storages = []
    hook = part.register_forward_hook(lambda module, args, out: storages.append(StorageWeakRef(out.untyped_storage())))
    out = run(images().requires_grad_())
    hook.remove()
    result = not storages[0].expired()
    out.sum().backward()
    return result


def test_hidden_features_are_not_stored():
    lean, plain = pair()
    assert is_stored(plain.act, plain)
    assert not is_stored(lean.act, lean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_stored(lean.act, lean)


def test_activation_checkpointing_stores_even_less():
    lean, _ = pair()
    assert not is_stored(lean.fc1, lambda x: checkpoint(lean, x, use_reentrant=False))


# ----- the same results -----


def test_gradients():
    lean, plain = pair()
    assert_same(results(lean, trainable(lean), images()), results(plain, trainable(plain), images()))
    x = images()[0, 0]
    second = [torch.autograd.functional.hessian(lambda x, mlp=mlp: mlp(x).square().sum(), x) for mlp in (lean, plain)]
    torch.testing.assert_close(*second)


def test_autocast():
    lean, plain = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(results(lean, trainable(lean), images()), results(plain, trainable(plain), images()))


@pytest.mark.parametrize("kwargs", [{"drop": 0.5}, {"norm_layer": nn.LayerNorm}, {"act_layer": nn.ReLU}])
def test_other_layers_between(kwargs):
    lean, plain = pair(**kwargs)
    assert_same(results(lean, trainable(lean), images()), results(plain, trainable(plain), images()))


def test_retained_graph():
    lean, _ = pair()
    out = lean(images()).square().sum()
    first, second = (torch.autograd.grad(out, list(lean.parameters()), retain_graph=True) for _ in range(2))
    assert_same(list(first), list(second), tolerance=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    lean, plain = pair()
    gradients = []
    for mlp, run in ((lean, lambda x: checkpoint(lean, x, use_reentrant=use_reentrant)), (plain, plain)):
        x = images().requires_grad_()
        run(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in mlp.parameters())])
    assert_same(*gradients)


def test_functional_transforms_and_compile():
    lean, plain = pair()
    x = images()
    loss = lambda mlp: lambda x: mlp(x).square().sum()  # noqa: E731
    expected = torch.func.grad(loss(plain))(x)
    torch.testing.assert_close(torch.func.grad(loss(lean))(x), expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss(lean)))(x), expected)
    compiled = torch.compile(copy.deepcopy(lean), fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, trainable(compiled), x), results(plain, trainable(plain), x))


def test_functional_call():
    lean, plain = pair()
    weights = {name: value.detach() * 2 for name, value in lean.state_dict().items()}

    def gradients(mlp):
        return torch.func.grad(lambda w: torch.func.functional_call(mlp, w, images()).square().sum())(weights)

    torch.testing.assert_close(gradients(lean), gradients(plain))
    torch.testing.assert_close(
        torch.func.functional_call(lean, weights, images()), torch.func.functional_call(plain, weights, images())
    )


def test_forward_mode():
    tangents = []
    for mlp in pair():
        with forward_ad.dual_level():
            out = mlp(forward_ad.make_dual(images(), torch.ones_like(images())))
            tangents.append(forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(*tangents)


# ----- every layer is called -----


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter, which wraps it like a LoRA layer of peft."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapt(mlp: Mlp) -> None:
    mlp.fc1, mlp.fc2 = Adapted(mlp.fc1), Adapted(mlp.fc2)


def wrap_forward(mlp: Mlp) -> None:
    forward = mlp.fc2.forward
    mlp.fc2.forward = lambda x: 2 * forward(x)


def scale_by_hook(mlp: Mlp) -> None:
    for name in PARTS:
        getattr(mlp, name).register_forward_hook(lambda module, args, out: 1.5 * out)
        getattr(mlp, name).register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


def scale_in_place(mlp: Mlp) -> None:
    mlp.act.register_forward_hook(lambda module, args, out: out.mul_(1.5))
    mlp.fc2.register_forward_pre_hook(lambda module, args: (args[0].mul_(1.5),))


def scale_in_place_without_grad(mlp: Mlp) -> None:
    def scale(module: nn.Module, args: Any, out: Tensor) -> None:
        with torch.no_grad():
            out.mul_(1.5)

    mlp.act.register_forward_hook(scale)


def freeze(mlp: Mlp) -> None:
    mlp.fc2.requires_grad_(False)


CHANGES = {
    "adapters": adapt,
    "weight_norm": lambda mlp: [parametrizations.weight_norm(mlp.fc1), parametrizations.weight_norm(mlp.fc2)],
    "spectral_norm": lambda mlp: parametrizations.spectral_norm(mlp.fc2),
    "old weight_norm": lambda mlp: nn.utils.weight_norm(mlp.fc2),
    "pruning": lambda mlp: prune.l1_unstructured(mlp.fc2, "weight", 0.5),
    "wrapped forward": wrap_forward,
    "hooks": scale_by_hook,
    "hooks in place": scale_in_place,
    "hooks in place without grad": scale_in_place_without_grad,
    "frozen": freeze,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_changed_parts(change):
    found, expected, unchanged = [], [], pair()[1]
    for mlp, into in zip(pair(), (found, expected), strict=True):
        torch.manual_seed(3)
        change(mlp)
        into.extend(results(mlp, trainable(mlp), images()))
    assert_same(found, expected)
    if change is not freeze and change is not CHANGES["old weight_norm"]:
        assert change is CHANGES["weight_norm"] or not torch.equal(found[0], unchanged(images()))


@pytest.mark.parametrize("name", PARTS)
def test_hooks_run(name):
    for mlp in pair():
        calls = []
        part = getattr(mlp, name)
        part.register_forward_pre_hook(lambda *_, calls=calls: calls.append("before"))
        part.register_forward_hook(lambda *_, calls=calls: calls.append("after"))
        part.register_full_backward_hook(lambda *_, calls=calls: calls.append("backward"))
        mlp(images()).sum().backward()
        assert calls == ["before", "after", "backward"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantization_aware_training():
    """The fake quantization of fc2's weight and input takes part in the result."""
    quantization = torch.ao.quantization
    outputs = []
    for mlp in pair():
        model = nn.Sequential(quantization.QuantStub(), mlp, quantization.DeQuantStub()).train()
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        quantization.prepare_qat(model, inplace=True)
        outputs.append(results(model, trainable(model), images()))
        assert model[1].fc2.activation_post_process.scale.item() != 1  # observed
    assert_same(*outputs)


@pytest.fixture
def process_group(tmp_path):
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_wrappers(process_group):
    lean, plain = pair()
    expected = results(plain, trainable(plain), images())
    wrapped = DistributedDataParallel(copy.deepcopy(lean))
    x = images().requires_grad_()
    wrapped(x).square().sum().backward()
    assert_same([x.grad, *(p.grad for p in wrapped.parameters())], expected[1:])
    mesh = dist.init_device_mesh("cpu", (1,))
    sharded = copy.deepcopy(lean)
    fully_shard(sharded.fc2, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    x = images().requires_grad_()
    sharded(x).square().sum().backward()
    assert_same([x.grad, *(p.grad.full_tensor() for p in sharded.parameters())], expected[1:])
