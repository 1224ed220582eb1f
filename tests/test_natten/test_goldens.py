"""The operator against goldens of NATTEN 0.17.5: 16 cases, computed on CPU with the original kernels."""

from __future__ import annotations

import json
import unittest
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from deterministic import array
from torch import Tensor

from test_natten.problems import function

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = 1e-4

CASES = json.loads((GOLDENS / "ops.json").read_text())


def load(tag: str) -> dict[str, Tensor]:
    """Return the golden results of a case: out, lse, dq, dk, dv and, with a bias, drpb; heads-first."""
    with np.load(GOLDENS / "ops.npz") as results:
        return {name.split("/")[1]: torch.from_numpy(results[name]) for name in results if name.startswith(f"{tag}/")}


def make_inputs(case: dict) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Return heads-first query, key and value, the bias table, and the gradient of the output."""
    tag, shape = case["tag"], (case["B"], case["H"], *case["shape"], case["d"])
    table = (case["H"], *(2 * k - 1 for k in case["kernel"]))
    q, k, v, dout = (torch.from_numpy(array(f"{tag}-{name}", shape, 1.0)) for name in ("q", "k", "v", "dout"))
    rpb = torch.from_numpy(array(f"{tag}-rpb", table, 0.5)).requires_grad_() if case["rpb"] else None
    return [x.requires_grad_() for x in (q, k, v)], rpb, dout


def window_of(case: dict) -> dict:
    """Return the window arguments of a case; the stride is always 1."""
    return {"kernel_size": case["kernel"], "dilation": case["dilation"], "is_causal": case["causal"]}


def fused(case: dict, qkv: list[Tensor], rpb: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    """Compute heads-first output and logsumexp with na*d."""
    q, k, v = (x.movedim(1, -2) for x in qkv)
    attend = function(len(case["shape"]))
    out, lse = attend(q, k, v, **window_of(case), rpb=rpb, return_lse=True, backend=backend)
    return out.movedim(-2, 1), lse.movedim(-1, 1)


def packed(case: dict, qkv: list[Tensor], rpb: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    """Compute heads-first output and logsumexp with na*d_qkvpacked."""
    attend = function(len(case["shape"]), "_qkvpacked")
    tensor = torch.stack([x.movedim(1, -2) for x in qkv], dim=-3)
    out, lse = attend(tensor, **window_of(case), rpb=rpb, return_lse=True, backend=backend)
    return out.movedim(-2, 1), lse.movedim(-1, 1)


def unfused(case: dict, qkv: list[Tensor], rpb: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute heads-first output and logsumexp with na*d_qk, softmax and na*d_av."""
    rank = len(case["shape"])
    q, k, v = qkv
    logits = function(rank, "_qk")(q * case["d"] ** -0.5, k, **window_of(case), rpb=rpb)
    return function(rank, "_av")(logits.softmax(-1), v, **window_of(case)), logits.logsumexp(-1)


class GoldensTest(unittest.TestCase):
    """Output, logsumexp and all gradients of all public functions."""

    def check(self, way: Callable) -> None:
        """Compare one way to compute attention with all cases."""
        for case in CASES:
            with self.subTest(case["tag"]):
                qkv, rpb, dout = make_inputs(case)
                out, lse = way(case, qkv, rpb)
                inputs = dict(zip(("dq", "dk", "dv", "drpb"), (*qkv, rpb), strict=True))
                inputs = {name: x for name, x in inputs.items() if x is not None}
                found = dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), dout), strict=True))
                self.compare({"out": out, "lse": lse, **found}, load(case["tag"]))

    def compare(self, found: dict[str, Tensor], golden: dict[str, Tensor]) -> None:
        """Compare names, shapes and values."""
        self.assertEqual(set(found), set(golden))
        for name, expected in golden.items():
            torch.testing.assert_close(
                found[name].detach(), expected, atol=TOLERANCE, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )

    def test_16_cases_of_three_ranks(self):
        self.assertEqual(len(CASES), 16)
        self.assertEqual({len(case["shape"]) for case in CASES}, {1, 2, 3})

    def test_fused(self):
        self.check(partial(fused, backend=None))

    def test_fused_on_the_reference_backend(self):
        self.check(partial(fused, backend="reference"))

    def test_packed(self):
        self.check(partial(packed, backend=None))

    def test_packed_on_the_reference_backend(self):
        self.check(partial(packed, backend="reference"))

    def test_unfused(self):
        self.check(unfused)
