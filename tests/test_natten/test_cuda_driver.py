"""Loading and launching kernels, with a mock of cuda.bindings, and with cuda.bindings on a mock of the driver."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from natten.backends.cpu.compiler import find_compilers
from natten.backends.cuda import driver, nvrtc

EMULATION = Path(__file__).resolve().parents[1] / "emulation"


class LaunchTest(unittest.TestCase):
    """Calls of the driver, recorded by a mock."""

    def setUp(self):
        self.driver = mock.MagicMock()
        for name in ("cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuModuleLoadData"):
            getattr(self.driver, name).return_value = (0, 7)
        for name in ("cuLaunchKernel", "cuCtxPushCurrent", "cuCtxPopCurrent", "cuFuncSetAttribute"):
            getattr(self.driver, name).return_value = (0,)
        self.driver.cuModuleGetFunction.return_value = (0, "function")
        self.code = mock.Mock(return_value=b"code")
        for target, name, replacement in (
            (driver, "bindings", lambda: self.driver),
            (nvrtc, "machine_code", self.code),
            (torch._C, "_cuda_getCurrentRawStream", lambda device: 40 + device),
            (torch.cuda, "is_current_stream_capturing", mock.Mock(return_value=False)),
            (torch.cuda, "get_device_capability", lambda device: (9, 0)),
        ):
            patcher = mock.patch.object(target, name, replacement, create=True)
            patcher.start()
            self.addCleanup(patcher.stop)
        driver._reset()
        self.addCleanup(driver._reset)
        self.kernel = driver.Kernel("attention.cu", "natten_attention", ("HEAD_DIM=8",), 128, 100 << 10)
        self.launch = partial(driver.launch, self.kernel, 5, (ctypes.c_int64 * 4)())

    def test_each_device_loads_once_and_launches_on_its_current_stream(self):
        for device in (0, 1, 0, 1):
            self.launch(device)
        self.assertEqual(self.driver.cuModuleLoadData.call_count, 2)
        streams = [call.args[8] for call in self.driver.cuLaunchKernel.call_args_list]
        self.assertEqual(streams, [40, 41, 40, 41])
        self.assertEqual(self.driver.cuLaunchKernel.call_args.args[1:8], (5, 1, 1, 128, 1, 1, 100 << 10))
        self.assertEqual([call.args[2] for call in self.driver.cuFuncSetAttribute.call_args_list[:2]], [100 << 10, 100])

    def test_another_context_is_pushed_and_popped(self):
        self.launch(0)
        self.driver.cuCtxPushCurrent.assert_not_called()
        self.driver.cuCtxGetCurrent.return_value = (0, 8)
        self.launch(0)
        self.driver.cuCtxPushCurrent.assert_called_once_with(7)
        self.driver.cuCtxPopCurrent.assert_called_once_with()

    def test_graph_capture_needs_loaded_kernels(self):
        torch.cuda.is_current_stream_capturing.return_value = True
        with self.assertRaisesRegex(RuntimeError, "capture"):
            self.launch(0)
        torch.cuda.is_current_stream_capturing.return_value = False
        self.launch(0)
        torch.cuda.is_current_stream_capturing.return_value = True
        self.launch(0)  # it is loaded now
        self.assertEqual(self.driver.cuLaunchKernel.call_count, 2)

    def test_each_kernel_of_a_problem_is_compiled_once(self):
        other = self.kernel._replace(name="natten_grad_query")
        for _ in range(2):
            driver.prepare([self.kernel, other], 0)
        self.launch(0)
        self.assertEqual((self.code.call_count, self.driver.cuModuleLoadData.call_count), (2, 2))

    def test_driver_errors_are_reported(self):
        self.driver.cuLaunchKernel.return_value = (1,)
        self.driver.cuGetErrorString.return_value = (0, b"invalid argument")
        with self.assertRaisesRegex(RuntimeError, "invalid argument"):
            self.launch(0)

    def test_a_forked_child_loads_kernels_again(self):
        self.launch(0)
        driver._reset()
        self.launch(0)
        self.assertEqual(self.driver.cuModuleLoadData.call_count, 2)


_LAUNCHES = """
import ctypes
from unittest import mock

import torch

from natten.backends.cuda import driver, nvrtc

parameters = (ctypes.c_int64 * 2)(11, -22)
kernel = driver.Kernel("attention.cu", "natten_attention", ("HEAD_DIM=8",), 128, 60000)
with (
    mock.patch.object(nvrtc, "machine_code", lambda *arguments: bytes.fromhex("7f454c46") + bytes(60)),
    mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0x500 + device, create=True),
    mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
    mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
):
    for blocks, device in ((1234, 0), (5, 0), (77, 1)):
        try:
            driver.launch(kernel, blocks, parameters, device)
            driver.synchronize(torch.device("cuda", device))
        except RuntimeError as error:
            print(error, flush=True)
    try:
        driver.require_context(torch.device("cuda", 1), "a reason")
    except driver.ContextLost as error:
        print(driver.version(), error, flush=True)
"""


@unittest.skipUnless(
    sys.platform == "linux" and importlib.util.find_spec("cuda"),
    "needs Linux and cuda-bindings",
)
class BindingsTest(unittest.TestCase):
    def test_calls_that_reach_the_driver(self):
        with tempfile.TemporaryDirectory() as folder:
            compiler = find_compilers()[0].command
            source = ["-x", "c", str(EMULATION / "libcuda.c"), "-o", str(Path(folder, "libcuda.so.1"))]
            subprocess.run([*compiler, "-shared", "-fPIC", "-w", *source], check=True)
            environment = os.environ | {"LD_LIBRARY_PATH": folder}
            command = [sys.executable, "-c", _LAUNCHES]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        load = ["load ELF", "function natten_attention of 0x30", "attribute 8 of 0x50 = 60000"]
        load.append("attribute 9 of 0x50 = 100")
        first = ["push 0xc0", *load, "launch 0x50 1234 1 1 128 1 1 60000 0x500: 11 -22", "pop"]
        first += ["push 0xc0", "query 0x500", "query 0x500", "pop"]
        second = ["push 0xc0", "launch 0x50 5 1 1 128 1 1 60000 0x500: 11 -22", "pop"]
        second += ["push 0xc0", "query 0x500", "pop"]
        third = ["push 0xc1", *load, "launch 0x50 77 1 1 128 1 1 60000 0x501: 11 -22", "pop"]
        *calls, error, push, query, pop, lost = done.stdout.splitlines()
        self.assertEqual(calls, [*first, *second, *third])
        self.assertIn("an illegal address", error)
        self.assertEqual([push, query, pop], ["push 0xc1", "query 0x501", "pop"])
        self.assertRegex(lost, "^13000 a reason.*Restart")


if __name__ == "__main__":
    unittest.main()
