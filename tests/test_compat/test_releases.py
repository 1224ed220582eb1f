"""Public names of NATTEN releases, and lines that import them, each in a new process."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import types
import unittest

import natten
from natten import functional
from test_compat.releases import EXCLUDED, RELEASES

LINES = """
from natten.functional import neighborhood_attention_generic
from natten.functional import FusedNeighborhoodAttention1D, FusedNeighborhoodAttention2D, FusedNeighborhoodAttention3D
from natten.functional import NATTEN1DQKRPBFunction, NATTEN1DAVFunction; NATTEN1DQKRPBFunction.apply
from natten.functional import NATTEN2DQKRPBFunction, NATTEN2DAVFunction; NATTEN2DAVFunction.apply
from natten.functional import NATTEN3DQKRPBFunction, NATTEN3DAVFunction
from natten.functional import NeighborhoodAttention2DQKAutogradFunction, NeighborhoodAttention2DAVAutogradFunction
from natten.modules import NeighborhoodAttentionGeneric
from natten.utils import check_all_args, log
from natten.utils.checks import check_all_args
from natten.utils.log import get_logger
import natten.utils.log
from natten.types import CausalArg2DTypeOrDed, Dimension2DTypeOrDed, DimensionType, KernelSchedule
import natten.na1d, natten.na2d, natten.na3d; natten.na2d.na2d is natten.na2d
from natten.na2d import na2d, NeighborhoodAttention2D
from natten import na1d, na2d, na3d; na2d.__name__
from natten.natten1d import NeighborhoodAttention1D
from natten.natten2d import natten2dqkrpb, natten2dav, na2d_qk_with_bias, na2d_av
from natten.natten3d import NeighborhoodAttention3D
from natten.experimental import na1d, na2d, na3d
import natten; natten.experimental.na2d
import natten; natten.utils.checks.check_all_args
import natten; natten.libnatten if hasattr(natten, "libnatten") else natten.HAS_LIBNATTEN
from natten._libnatten import HAS_LIBNATTEN
from natten._environment import HAS_LIBNATTEN
from natten.backends import can_run_cutlass_fna, choose_backend, get_compatible_backends
from natten.context import NattenContext, set_memory_usage_preference, use_kv_parallelism_in_fused_na
from natten.flops import qk_1d_rpb_flop, qk_2d_rpb_flop, qk_3d_rpb_flop, av_1d_flop, av_2d_flop, av_3d_flop
from natten.flops import qk_1d_flop, qk_2d_flop, qk_3d_flop
from natten.flops import qk_2d_rpb_flop, av_2d_flop, add_natten_handle
from natten.flops import fna_flop_count, na_qk_flop_count, na_av_flop_count, get_flops
from natten.utils.testing import skip_if_libnatten_is_not_supported, supports_bfloat16
from natten.attn_merge import merge_attentions
from natten import attention, merge_attentions, get_configs_for_cutlass_fna
from natten.version import __version__
""".strip().splitlines()


class NamesTest(unittest.TestCase):
    """Names by release."""

    def test_every_public_name_is_present_or_excluded_for_a_reason(self):
        for release, modules in RELEASES.items():
            count = 0
            for module, names in modules.items():
                if module in EXCLUDED:
                    continue
                found = importlib.import_module(module)
                for name in names.split():
                    count += 1
                    with self.subTest(release, module=module, name=name):
                        present = hasattr(found, name)
                        self.assertNotEqual(present, f"{module}.{name}" in EXCLUDED)
            self.assertGreater(count, 20)

    def test_every_exclusion_is_needed(self):
        names = {f"{m}.{n}" for modules in RELEASES.values() for m, ns in modules.items() for n in ns.split()}
        modules = {module for release in RELEASES.values() for module in release}
        self.assertLessEqual(set(EXCLUDED), names | modules)


# A fork per line: natten is new in each, but PyTorch, whose import takes most of the time, is not.
RUN_LINES = """
import os, sys, traceback
import torch
for line in sys.stdin.read().splitlines():
    if os.fork() == 0:
        try:
            exec(line)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


class LinesTest(unittest.TestCase):
    """Import lines of public code."""

    @unittest.skipUnless(hasattr(os, "fork"), "requires os.fork")
    def test_each_line_in_a_new_process(self):
        command = [sys.executable, "-c", RUN_LINES]
        done = subprocess.run(command, input="\n".join(LINES), capture_output=True, text=True)
        self.assertEqual(done.stdout.split(), ["0"] * len(LINES), done.stderr)

    def test_there_is_no_libnatten(self):
        """Code probes for it by importing it."""
        with self.assertRaises(ImportError):
            from natten import libnatten  # noqa: F401


class IdentityTest(unittest.TestCase):
    """Old places hold the same objects."""

    def test_functions_and_layers(self):
        for rank in (1, 2, 3):
            old, function = importlib.import_module(f"natten.natten{rank}d"), getattr(natten, f"na{rank}d")
            self.assertIs(importlib.import_module(f"natten.na{rank}d"), function)
            self.assertIsInstance(function, types.FunctionType)
            self.assertIs(getattr(function, f"na{rank}d"), function)
            for name in (f"NeighborhoodAttention{rank}D", f"na{rank}d_qk", f"natten{rank}dav"):
                self.assertIs(getattr(old, name), getattr(natten, name))
                self.assertIs(getattr(function, name), getattr(natten, name))
            self.assertIsNotNone(importlib.util.find_spec(f"natten.na{rank}d"))
        self.assertIs(natten.attention, functional.attention)

    def test_importing_takes_no_other_modules(self):
        code = "import torch, sys; before = set(sys.modules); import natten; print(*set(sys.modules) - before)"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
        self.assertIn("natten.compat", loaded)
        self.assertFalse({name.partition(".")[0] for name in loaded} & {"sympy", "unittest", "fvcore", "timm"})


class HelpersTest(unittest.TestCase):
    """natten.utils."""

    def test_check_all_args(self):
        from natten.utils import check_all_args

        self.assertEqual(check_all_args(2, 3, None, (True, False)), ((3, 3), (1, 1), (True, False)))
        self.assertEqual(check_all_args(1, [5], 2, None, None), ((5,), (2,), (1,), (False,)))
        with self.assertRaisesRegex(ValueError, "kernel_size"):
            check_all_args(2, (3, 3, 3), 1, False)
        with self.assertRaisesRegex(TypeError, "check_all_args"):
            check_all_args(2, 3, 1)

    def test_is_self_attention(self):
        import torch
        from natten.utils.checks import is_self_attention

        x = torch.zeros(1, 4, 5, 2, 8)
        self.assertTrue(is_self_attention(x, (4, 5), (False, False), False))
        self.assertFalse(is_self_attention(x, (4, 5), (True, False), False))
        self.assertFalse(is_self_attention(x, (3, 5), (False, False), False))
        self.assertTrue(is_self_attention(x[0], (5,), (True,), False))
        self.assertFalse(is_self_attention(x[0], (5,), (True,), True))

    def test_tensor_checks(self):
        import torch
        from natten.utils.checks import additional_kv_tensor_checks, fmha_tensor_checks, na_tensor_checks

        x, narrow = torch.zeros(1, 4, 5, 2, 8), torch.zeros(1, 4, 5, 2, 4)
        self.assertTrue(na_tensor_checks(x, x, narrow))
        self.assertFalse(na_tensor_checks(x, x, narrow, must_match_head_dims=True, raise_error=False))
        with self.assertRaisesRegex(ValueError, "value"):
            na_tensor_checks(x, x, narrow, must_match_head_dims=True)
        self.assertFalse(fmha_tensor_checks(x, x, x, raise_error=False))
        with self.assertRaisesRegex(ValueError, "additional_values"):
            additional_kv_tensor_checks(x, x, x, x[:, 0], None)
