"""Switches of older NATTEN releases: they exist, are consistent with each other and change no result."""

from __future__ import annotations

import inspect
import unittest
import warnings
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

import natten
from natten import context, functional
from test_natten.test_errors import ErrorTestCase, qkv_of

# Imported by code for NATTEN 0.15 to 0.17.5, and 0.20 and later.
_NAMES = """
    are_deterministic_algorithms_enabled disable_autotuner disable_gemm_na disable_tf32 disable_tiled_na enable_gemm_na
    enable_tf32 enable_tiled_na force_flex_attention get_memory_usage_preference has_bfloat has_cuda has_fna
    has_fp32_gemm has_fp64_gemm has_fused_na has_gemm has_half has_tf32_gemm is_autotuner_enabled
    is_autotuner_enabled_for_backward is_autotuner_enabled_for_forward is_autotuner_thorough_for_backward
    is_autotuner_thorough_for_forward is_fna_enabled is_fused_na_enabled is_gemm_na_enabled
    is_kv_parallelism_in_fused_na_enabled is_memory_usage_default is_memory_usage_strict is_memory_usage_unrestricted
    is_tf32_in_gemm_na_enabled is_tiled_na_enabled set_memory_usage_preference should_force_flex_attention
    should_use_flex_attention use_autotuner use_deterministic_algorithms use_flex_attention use_fna use_fused_na
    use_gemm_na use_kv_parallelism_in_fused_na use_tf32_in_gemm_na use_tiled_na
    allow_flex_compile allow_flex_compile_backprop disable_flex_compile disable_flex_compile_backprop
    is_flex_compile_allowed is_flex_compile_backprop_allowed
"""
NAMES = _NAMES.split()
GETTERS = [name for name in NAMES if name.startswith(("is_", "should_", "get_"))]
SWITCHES = [name for name in NAMES if name.startswith(("use_", "set_", "allow_", "force_", "enable_", "disable_"))]


class SwitchTestCase(ErrorTestCase):
    """Base class that resets all switches."""

    def setUp(self):
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self.addCleanup(torch.use_deterministic_algorithms, deterministic, warn_only=warn_only)
        self.addCleanup(context.NattenContext.reset)
        context.NattenContext.reset()


class ImportTest(unittest.TestCase):
    """Import locations and signatures."""

    def test_modules_share_the_same_functions(self):
        for name in NAMES:
            with self.subTest(name):
                function = getattr(context, name)
                self.assertIs(getattr(natten, name), function)
                self.assertIs(getattr(functional, name), function)
                self.assertTrue(callable(function) and function.__doc__)
        self.assertLessEqual(set(NAMES), set(context.__all__))

    def test_parameters_are_those_of_the_older_releases(self):
        for name, expected in (
            (
                "use_fused_na",
                {"mode": True, "kv_parallel": True, "use_flex_attention": False, "force_flex_attention": False},
            ),
            ("use_tiled_na", {"mode": True}),
            ("set_memory_usage_preference", {"pref": "default"}),
            ("allow_flex_compile", {"mode": True, "backprop": False}),
            ("disable_tf32", {}),
        ):
            parameters = inspect.signature(getattr(natten, name)).parameters
            self.assertEqual({name: parameter.default for name, parameter in parameters.items()}, expected)
        with self.assertRaises(TypeError):
            natten.use_tiled_na(wrong=True)


class GettersTest(SwitchTestCase):
    """Values of getters after switches."""

    def check(self, getters: str, *steps: tuple[Callable, str]) -> None:
        """Assert that after each step exactly the getters named with it return True."""
        for number, (step, expected) in enumerate(steps):
            step()
            with self.subTest(step=number):
                values = {name: getattr(natten, name)() for name in getters.split()}
                self.assertEqual({name for name, value in values.items() if value is True}, set(expected.split()))
                self.assertEqual({type(value) for value in values.values()}, {bool})

    def test_fused_na(self):
        fused, kv = "is_fused_na_enabled is_fna_enabled", "is_kv_parallelism_in_fused_na_enabled"
        use, force = "should_use_flex_attention", "should_force_flex_attention"
        self.check(
            f"{fused} {kv} {use} {force}",
            (lambda: None, kv),
            (lambda: natten.use_fused_na(), f"{fused} {kv}"),
            (lambda: natten.use_fna(True, kv_parallel=False), fused),
            (lambda: natten.use_fna(False), ""),
            (lambda: natten.use_flex_attention(), f"{fused} {kv} {use}"),
            (lambda: natten.force_flex_attention(), f"{fused} {kv} {use} {force}"),
            (lambda: natten.use_fused_na(True, False, True), f"{fused} {use}"),
            (lambda: natten.use_fused_na(False, force_flex_attention=True), ""),
            (lambda: natten.use_kv_parallelism_in_fused_na(), kv),
            (lambda: natten.use_kv_parallelism_in_fused_na(False), ""),
        )

    def test_autotuner(self):
        enabled, forward, backward = (f"is_autotuner_enabled{end}" for end in ("", "_for_forward", "_for_backward"))
        thorough, thorough_back = (f"is_autotuner_thorough_for_{way}" for way in ("forward", "backward"))
        self.check(
            f"{enabled} {forward} {backward} {thorough} {thorough_back}",
            (lambda: None, ""),
            (lambda: natten.use_autotuner(True), f"{enabled} {forward}"),
            (lambda: natten.use_autotuner(backward_pass=True), f"{enabled} {forward} {backward}"),
            (lambda: natten.use_autotuner(False), f"{enabled} {backward}"),
            (
                lambda: natten.use_autotuner(None, None, True, True, 5, 5, 9, 9),
                f"{enabled} {backward} {thorough} {thorough_back}",
            ),
            (lambda: natten.use_autotuner(False, False), f"{thorough} {thorough_back}"),
            (lambda: natten.disable_autotuner(), ""),
        )

    def test_memory_usage(self):
        default, strict, unrestricted = (f"is_memory_usage_{pref}" for pref in ("default", "strict", "unrestricted"))
        self.check(
            f"{default} {strict} {unrestricted}",
            (lambda: None, default),
            (lambda: natten.set_memory_usage_preference("strict"), strict),
            (lambda: natten.set_memory_usage_preference(pref="unrestricted"), unrestricted),
            (lambda: natten.set_memory_usage_preference(), default),
        )
        natten.set_memory_usage_preference("strict")
        self.assertIs(natten.get_memory_usage_preference(), context.MemoryUsagePreference.Strict)
        self.assert_error(("pref", "'tight'", "'strict'"), natten.set_memory_usage_preference, "tight")
        self.assertTrue(natten.is_memory_usage_strict())

    def test_flex_compile(self):
        allowed, backprop = "is_flex_compile_allowed", "is_flex_compile_backprop_allowed"
        self.check(
            f"{allowed} {backprop}",
            (lambda: None, ""),
            (lambda: natten.allow_flex_compile(), allowed),
            (lambda: natten.allow_flex_compile_backprop(), f"{allowed} {backprop}"),
            (lambda: natten.disable_flex_compile_backprop(), allowed),
            (lambda: natten.allow_flex_compile(True, True), f"{allowed} {backprop}"),
            (lambda: natten.disable_flex_compile(), ""),
            (lambda: natten.allow_flex_compile(False, True), ""),
        )

    def test_kernels(self):
        for feature, short in (("tiled_na", "tiled_na"), ("gemm_na", "gemm_na"), ("tf32_in_gemm_na", "tf32")):
            getter, use = f"is_{feature}_enabled", getattr(natten, f"use_{feature}")
            self.check(
                getter,
                (lambda: None, getter),
                (getattr(natten, f"disable_{short}"), ""),
                (getattr(natten, f"enable_{short}"), getter),
                (partial(use, False), ""),
                (use, getter),
                (partial(use, mode=False), ""),
            )

    def test_reset(self):
        start = {name: getattr(natten, name)() for name in GETTERS}
        for name in SWITCHES:
            getattr(natten, name)()
        self.assertNotEqual({name: getattr(natten, name)() for name in GETTERS}, start)
        context.NattenContext.reset()
        self.assertEqual({name: getattr(natten, name)() for name in GETTERS}, start)
        self.assertIs(context.AutotunerContext, context.NattenContext)


class EffectiveTest(SwitchTestCase):
    """Switches that have an effect, and getters that report real facts."""

    def test_cuda(self):
        for is_available in (False, True):
            with mock.patch("torch.cuda.is_available", return_value=is_available):
                for name in ("has_cuda", "has_half", "has_bfloat"):
                    self.assertIs(getattr(natten, name)(), is_available)
                self.assertIs(natten.has_half(0), is_available)

    def test_kernels(self):
        for name in ("has_fused_na", "has_fna"):
            self.assertIs(getattr(natten, name)(), True)
        for name in ("has_gemm", "has_tf32_gemm", "has_fp32_gemm", "has_fp64_gemm"):
            self.assertIs(getattr(natten, name)(0), False)

    def test_deterministic_algorithms_are_those_of_pytorch(self):
        torch.use_deterministic_algorithms(False)
        natten.use_deterministic_algorithms()
        self.assertTrue(torch.are_deterministic_algorithms_enabled())
        self.assertTrue(torch.is_deterministic_algorithms_warn_only_enabled())
        self.assertTrue(natten.are_deterministic_algorithms_enabled())
        natten.use_deterministic_algorithms(False)
        self.assertFalse(torch.are_deterministic_algorithms_enabled())
        self.assertFalse(natten.are_deterministic_algorithms_enabled())

    def test_deterministic_algorithms_that_raise_are_kept(self):
        torch.use_deterministic_algorithms(True)
        natten.use_deterministic_algorithms(True)
        self.assertFalse(torch.is_deterministic_algorithms_warn_only_enabled())


class NoEffectTest(SwitchTestCase):
    """Switches log one debug line and change no result."""

    def test_no_warning_and_one_debug_line(self):
        for name in SWITCHES:
            if name != "use_deterministic_algorithms":
                with self.subTest(name), warnings.catch_warnings(), self.assertLogs("natten", "DEBUG") as logged:
                    warnings.simplefilter("error")
                    getattr(natten, name)()
                self.assertEqual(len(logged.output), 1)
                self.assertIn(name, logged.output[0])

    def test_getters_log_nothing(self):
        with self.assertNoLogs("natten", "DEBUG"):
            for name in NAMES:
                if name not in SWITCHES:
                    getattr(natten, name)()

    def test_results_are_the_same(self):
        q, k, v = (torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in qkv_of())
        before = natten.na2d(q, k, v, 3)
        for name in SWITCHES:
            getattr(natten, name)()
            with self.subTest(name):
                self.assertTrue(torch.equal(natten.na2d(q, k, v, 3), before))
