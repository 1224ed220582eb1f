"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import pytest

from natten.backends.cpu import build
from natten.backends.cpu.compiler import FLAGS, find_compilers

# Run tests of test_cpu.py, named by the further arguments, with the library at the path of the first argument.
_RUN = """
import ctypes, sys, unittest
from natten.backends.cpu import build

library = ctypes.CDLL(sys.argv.pop(1))
build.cpu_library = lambda: library
unittest.main(module="test_natten.test_cpu", argv=sys.argv)
"""
_TESTS = [
    "AgainstReferenceTest.test_fused_float32",
    "AgainstReferenceTest.test_fused_bfloat16",
    "AgainstReferenceTest.test_fused_float16",
    "AgainstReferenceTest.test_unfused_float32",
    "AgainstReferenceTest.test_unfused_bfloat16",
    "AgainstReferenceTest.test_fewer_key_heads_and_other_value_head_dims",
    "AgainstReferenceTest.test_large_windows",
    "AgainstReferenceTest.test_one_image_and_head_on_many_threads",
    "PropertiesTest.test_strided_views",
]
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1")


def sanitizer_runtime(compiler: str) -> str | None:
    """Return the libraries to preload: the compiler's AddressSanitizer and libstdc++; None if it has no sanitizer."""
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [compiler, f"-print-file-name={name}"]
        paths.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    if not all(Path(path).is_absolute() for path in paths):
        return None
    return " ".join(paths)


@pytest.mark.slow
class SanitizersTest(unittest.TestCase):
    """The sweep of test_cpu.py, and a program with a mistake that the sanitizers must detect."""

    def setUp(self):
        compilers = [c.command[0] for c in find_compilers() if sanitizer_runtime(c.command[0])]
        if not compilers:
            self.skipTest("no compiler with AddressSanitizer found")
        self.compiler = compilers[0]
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def compile(self, *arguments: str) -> Path:
        library = self.folder / "lib.so"
        command = [self.compiler, *FLAGS, "-march=native", "-fPIC", "-pthread", *_SANITIZE, "-shared", *arguments]
        subprocess.run([*command, "-o", str(library)], check=True, capture_output=True, text=True)
        return library

    def run_python(self, *arguments: str) -> subprocess.CompletedProcess:
        tests = Path(__file__).resolve().parents[1]
        environment = os.environ | {
            "LD_PRELOAD": sanitizer_runtime(self.compiler),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
            "PYTHONPATH": os.pathsep.join((str(tests.parent), str(tests))),
        }
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=3600
        )

    def test_sweep(self):
        library = self.compile(*map(str, sorted(build.SOURCES.glob("*.cpp"))))
        done = self.run_python("-c", _RUN, str(library), *_TESTS)
        self.assertEqual(done.returncode, 0, done.stderr[-4000:])
        self.assertRegex(done.stderr, rf"Ran {len(_TESTS)} tests")

    def test_mistakes_are_detected(self):
        source = self.folder / "mistake.cpp"
        source.write_text(
            'extern "C" __attribute__((visibility("default"))) int mistake(int i) '
            "{ int* x = new int[4]; int y = x[i]; delete[] x; return y; }"
        )
        library = self.compile(str(source))
        done = self.run_python("-c", f"import ctypes; ctypes.CDLL({str(library)!r}).mistake(4)")
        self.assertRegex(done.stderr, "heap-buffer-overflow|insufficient space")
        self.assertNotEqual(done.returncode, 0)


if __name__ == "__main__":
    unittest.main()
