"""The check of CUDA kernels on first use: with broken kernels on an emulated GPU, and with doubles of the driver."""

from __future__ import annotations

import os
import shutil
import tempfile
import unittest
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from emulation.launcher import emulated_gpu

import natten
from natten.backends.cuda import driver, first_use, nvrtc
from natten.backends.families import Family
from natten.backends.kernels import warn_fallback
from natten.backends.self_check import run_self_check

FORWARD = Family("forward", "float32")
# In attention.cu: the last key of each window is ignored; the sum is never stored.
IGNORED_KEY = ("slot < KERNEL_X; ++slot", "slot < KERNEL_X - 1; ++slot")
NOTHING_STORED = ("sum.store(Rows<Storage>(p, OUT", "if (p.heads < 0) sum.store(Rows<Storage>(p, OUT")


class FirstUseTestCase(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        environment = {"NATTEN_CACHE_DIR": str(self.folder / "cache"), "XDG_CACHE_HOME": str(self.folder / "home")}
        patcher = mock.patch.dict(os.environ, environment)
        patcher.start()
        self.addCleanup(patcher.stop)
        os.environ.pop("NATTEN_SELF_CHECK", None)
        patcher = mock.patch.object(nvrtc, "version", lambda: (13, 0))
        patcher.start()
        self.addCleanup(patcher.stop)
        self.forget()
        self.addCleanup(self.forget)

    def forget(self) -> None:
        """Do as a new process would."""
        first_use.reset()
        warn_fallback.cache_clear()
        nvrtc.hash_of_sources.cache_clear()

    def break_kernel(self, file: str, correct: str, wrong: str) -> None:
        """Let the emulated GPU run a changed copy of the sources."""
        sources = self.folder / f"sources {len(list(self.folder.iterdir()))}"
        shutil.copytree(nvrtc.SOURCES, sources)
        text = (sources / file).read_text()
        self.assertIn(correct, text)
        (sources / file).write_text(text.replace(correct, wrong))
        patcher = mock.patch.object(nvrtc, "SOURCES", sources)
        patcher.start()
        self.addCleanup(patcher.stop)
        nvrtc.hash_of_sources.cache_clear()


class EmulatedTest(FirstUseTestCase):
    def attend(self, **gpu) -> tuple[torch.Tensor, int]:
        """Return the output of a small call, and the number of launches."""
        x = torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(0))
        with emulated_gpu(has_self_check=True, **gpu) as emulator:
            return natten.na1d(x, x, x, 3, backend="cuda"), len(emulator.launched)

    def test_checked_once_per_machine(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.assertEqual(self.attend()[1], 2)  # the check, and the call
            self.assertEqual(self.attend()[1], 1)
            self.forget()
            self.assertEqual(self.attend()[1], 1)
        self.assertEqual(len(list((self.folder / "cache").glob("natten_verdict-*.json"))), 1)

    def test_another_driver_or_gpu_is_checked_again(self):
        self.attend()
        with emulated_gpu(has_self_check=True):
            for name, value in (("version", lambda: 14000), ("device_name", lambda device: "another GPU")):
                with self.subTest(name), mock.patch.object(driver, name, value):
                    self.assertIsNone(first_use._read(FORWARD, torch.device("cpu")))
            self.assertIsNotNone(first_use._read(FORWARD, torch.device("cpu")))

    def test_switched_off(self):
        with mock.patch.dict(os.environ, NATTEN_SELF_CHECK="0"):
            self.assertEqual(self.attend()[1], 1)
        self.assertFalse((self.folder / "cache").exists())

    def test_a_wrong_kernel_is_replaced_by_the_reference(self):
        exact = natten.na1d(*[torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(0))] * 3, 3)
        for mistake in (IGNORED_KEY, NOTHING_STORED):
            self.break_kernel("attention.cu", *mistake)
            self.forget()
            with self.subTest(mistake[1]):
                with self.assertWarnsRegex(RuntimeWarning, "forward float32.*emulated GPU.*natten.check"):
                    out, launches = self.attend()
                torch.testing.assert_close(out, exact)
                self.assertEqual(launches, 1)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    self.assertEqual(self.attend()[1], 0)
                self.forget()  # a later process does not run the kernel at all
                with self.assertWarns(RuntimeWarning):
                    self.assertEqual(self.attend()[1], 0)

    @pytest.mark.slow
    def test_only_the_families_of_a_wrong_kernel_fail(self):
        self.break_kernel("attention.cu", *IGNORED_KEY)
        with emulated_gpu(has_self_check=True):
            failed = [row.name for row in run_self_check("cuda", "cpu") if row.verdict == "failed"]
        self.assertEqual(failed, ["forward float32", "forward bfloat16", "forward float16"])

    def test_other_families_stay_in_use(self):
        self.break_kernel("attention.cu", *IGNORED_KEY)
        x = torch.randn(1, 2, 9, 8)
        with emulated_gpu(has_self_check=True) as emulator, warnings.catch_warnings():
            warnings.simplefilter("error")
            natten.na1d_qk(x, x, 3, backend="cuda")
            self.assertEqual(emulator.launched[-1], "natten_query_key")

    def test_a_failed_launch_is_replaced_by_the_reference(self):
        """If the GPU still works afterwards."""
        with (
            emulated_gpu(has_self_check=True),
            mock.patch.object(driver, "launch", side_effect=RuntimeError("invalid value")),
            self.assertWarnsRegex(RuntimeWarning, "invalid value"),
        ):
            x = torch.ones(1, 9, 2, 8)
            self.assertTrue(torch.equal(natten.na1d(x, x, x, 3, backend="cuda"), x))

    def test_nothing_is_checked_during_capture(self):
        with emulated_gpu(has_self_check=True) as emulator, mock.patch.object(driver, "is_capturing", lambda: True):
            x = torch.ones(1, 9, 2, 8)
            natten.na1d(x, x, x, 3, backend="cuda")
        self.assertEqual(len(emulator.launched), 1)
        self.assertEqual(self.attend()[1], 2)  # checked afterwards

    def test_an_incomplete_nvrtc_is_tried_again_by_the_next_process(self):
        with (
            emulated_gpu(has_self_check=True),
            mock.patch.object(driver, "launch", side_effect=nvrtc.Unavailable("builtins are missing")),
            self.assertWarnsRegex(RuntimeWarning, "builtins"),
        ):
            x = torch.ones(1, 9, 2, 8)
            natten.na1d(x, x, x, 3, backend="cuda")
        self.forget()
        self.assertEqual(self.attend()[1], 2)

    def test_no_folder_for_verdicts(self):
        (self.folder / "cache").write_text("a file")
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(self.folder / "cache" / "not")):
            self.assertEqual(self.attend()[1], 2)
            self.assertEqual(self.attend()[1], 1)


class LostContextTest(FirstUseTestCase):
    """An illegal address, after which every call of the driver fails."""

    DEVICE = torch.device("cuda:0")

    def setUp(self):
        super().setUp()
        self.driver = mock.MagicMock()
        self.driver.CUresult.CUDA_ERROR_NOT_READY = 600
        for name in ("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent"):
            getattr(self.driver, name).return_value = (0, 7)
        self.driver.cuGetErrorString.return_value = (0, b"an illegal memory access was encountered")
        self.driver.cuStreamQuery.return_value = (0,)
        for target, name, replacement in (
            (driver, "bindings", lambda: self.driver),
            (driver, "version", lambda: 13000),
            (driver, "device_name", lambda device: "a GPU"),
            (driver, "is_capturing", lambda: False),
            (torch._C, "_cuda_getCurrentRawStream", lambda device: 40 + device),
        ):
            patcher = mock.patch.object(target, name, replacement, create=True)
            patcher.start()
            self.addCleanup(patcher.stop)
        driver._reset()
        self.addCleanup(driver._reset)

    def check(self, kernels) -> str | None:
        with mock.patch("natten.backends.families.check", kernels):
            return first_use.refusal(FORWARD, self.DEVICE, None)

    def fail(self, kernels, family, device, wait):
        self.driver.cuStreamQuery.return_value = (700,)
        wait()

    def test_the_verdict_outlives_the_process(self):
        def broken(*arguments):
            try:
                self.fail(*arguments)
            except RuntimeError as error:
                return first_use.Verdict(str(error))

        with self.assertRaisesRegex(driver.ContextLost, "illegal memory access.*Restart"):
            self.check(broken)
        self.forget()
        self.driver.cuStreamQuery.side_effect = AssertionError("the next process does not run the kernels")
        self.assertIn("illegal memory access", self.check(broken))

    def test_earlier_errors_are_not_those_of_the_kernels(self):
        self.driver.cuStreamQuery.return_value = (700,)
        with self.assertRaisesRegex(RuntimeError, "illegal memory access"):
            self.check(lambda *arguments: self.fail("the check ran"))
        self.assertFalse((self.folder / "cache").exists())

    def test_kernels_that_do_not_end(self):
        self.driver.cuStreamQuery.return_value = (600,)
        with mock.patch.object(driver, "_PATIENCE_S", 0.01), self.assertRaisesRegex(RuntimeError, "do not end"):
            driver.synchronize(self.DEVICE)

    def test_waiting(self):
        self.driver.cuStreamQuery.side_effect = [(600,), (600,), (0,)]
        driver.synchronize(self.DEVICE)
        self.assertEqual(self.driver.cuStreamQuery.call_args_list, [mock.call(40)] * 3)


if __name__ == "__main__":
    unittest.main()
