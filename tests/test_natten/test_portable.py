"""The CPU kernels without Python: the harness itself, on this machine, and the kernels for arm64 under emulation."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import unittest
from pathlib import Path

import pytest
from portable import launcher, recorder

from natten.backends.cpu import build, compiler
from tools import build_wheels

OPS = {"attention", "attention_backward", "query_key", "query_key_backward", "weight_value", "weight_value_backward"}
DTYPES = ("float32", "bfloat16", "float16")
FAULTS = {  # the mistakes that faults.cpp makes, and how the harness describes them
    "wrong value": "elements are wrong",
    "missing value": "is -?nan",
    "written outside": "overwritten",
    "overwritten input": "(VALUE|KEY) is overwritten",
    "not deterministic": "differs",
    "failure": "returns 1",
}


class PortableTestCase(unittest.TestCase):
    """A test case with a folder, problems and the harness for a target."""

    target: launcher.Target
    is_quick = True

    @classmethod
    def find_target(cls) -> launcher.Target:
        raise NotImplementedError

    @classmethod
    def setUpClass(cls):
        try:
            cls.target = cls.find_target()
        except launcher.MissingTool as error:
            raise unittest.SkipTest(str(error)) from error
        cls.folder = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.problems, cls.harness = cls.folder / "problems", cls.folder / "harness.exe"
        cls.cases = recorder.record(cls.problems, cls.is_quick)
        cls.target.compile(launcher.HARNESS, cls.harness)

    def check(self, library: Path, target: launcher.Target | None = None) -> None:
        """Check that a library passes all cases of all ops and dtypes."""
        outcome = (target or self.target).run(self.harness, self.problems, library)
        print(outcome.output, outcome.errors)  # shown if the test fails, or with pytest -s
        self.assertEqual(outcome.status, 0)
        self.assertEqual(outcome.totals, {"cases": self.cases, "failed": 0})
        self.assertEqual(set(outcome.table), set(itertools.product(OPS, DTYPES)))
        self.assertGreaterEqual(min(outcome.table.values()), 4)


@pytest.mark.skipif(os.name != "posix", reason="the harness runs native libraries on Linux and macOS")
class HarnessTest(PortableTestCase):
    """The harness on this machine: the kernels pass, and mistakes are found."""

    @classmethod
    def find_target(cls):
        return launcher.native()

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        try:
            cls.library = build.find().path
        except build.Unavailable as error:
            raise unittest.SkipTest(str(error)) from error
        if cls.library is None:
            raise unittest.SkipTest("no folder holds the compiled library")
        cls.faults = cls.folder / "faults.so"
        cls.target.compile(launcher.FAULTS, cls.faults, "-shared", "-fPIC")

    def run_with(self, fault: str) -> launcher.Outcome:
        environment = os.environ | {"NATTEN_KERNELS": str(self.library), "NATTEN_FAULT": fault}
        return self.target.run(self.harness, self.problems, self.faults, environment=environment)

    def test_kernels(self):
        self.check(self.library)

    def test_without_a_fault(self):
        outcome = self.run_with("none")
        self.assertEqual((outcome.status, outcome.totals["failed"]), (0, 0), outcome.output)

    def test_faults_are_found(self):
        for fault, description in FAULTS.items():
            with self.subTest(fault):
                outcome = self.run_with(fault)
                self.assertEqual(outcome.status, 1, outcome.errors)
                failures = outcome.lines("FAILED")
                self.assertEqual(outcome.totals["failed"], len(failures))
                for line in failures:
                    self.assertRegex(line, description)
                if fault == "not deterministic":  # only calls on several threads are repeated
                    self.assertGreater(len(failures), sum(outcome.table.values()) // 2)
                elif fault == "wrong value":  # added to results in float32
                    cases = {key: count for key, count in outcome.table.items() if key[1] == "float32"}
                    self.assertEqual(len(failures), sum(cases.values()))
                else:
                    self.assertEqual(len(failures), sum(outcome.table.values()))

    def test_files_that_cannot_be_used(self):
        cut = self.folder / "cut"
        cut.write_bytes(self.problems.read_bytes()[:-1])
        for problems, library in (
            (cut, self.library),
            (self.harness, self.library),
            (self.folder / "missing", self.library),
            (self.problems, self.folder / "missing"),
            (self.problems, self.harness),
        ):
            with self.subTest(problems=problems.name, library=library.name):
                outcome = self.target.run(self.harness, problems, library)
                self.assertEqual((outcome.status, outcome.totals), (2, {}))
                self.assertTrue(outcome.errors.startswith("error: "))


@pytest.mark.slow
class LevelsTest(PortableTestCase):
    """The kernels of each level of x86-64 that this CPU supports: other vectors, other tiles, other conversions."""

    is_quick = False

    @classmethod
    def find_target(cls):
        return launcher.native()

    def test_levels(self):
        levels = [level for level, needed in build.LEVELS.items() if needed <= build.cpu_flags()]
        for level in levels:
            with self.subTest(level):
                library = self.folder / f"{level}.so"
                compiler.compile_library(self.target.compiler, build.SOURCES, library, f"-march={level}")
                self.check(library)


class EmulatedTestCase(PortableTestCase):
    """The libraries of a wheel, and one compiled as on first use on such a machine."""

    is_quick = False
    wheel: str

    def check_with_and_without_openmp(self, library: Path) -> None:
        for openmp in {self.target.openmp, ()}:
            with self.subTest(library.name, openmp=openmp):
                self.check(library, self.target._replace(openmp=openmp))

    def check_wheel(self) -> None:
        if not compiler.ziglang():
            self.skipTest("no package ziglang; pip install ziglang")
        build_wheels.build_libraries(build_wheels.PLATFORMS[self.wheel], self.folder)
        for library in filter(self.is_supported, sorted(self.folder.glob("libnatten_cpu-*"))):
            self.check_with_and_without_openmp(library)

    def is_supported(self, library: Path) -> bool:
        """Return whether this machine can run it."""
        return True


@pytest.mark.slow
class Arm64Test(EmulatedTestCase):
    """The kernels for arm64, under qemu."""

    wheel = "manylinux_2_28_aarch64"

    @classmethod
    def find_target(cls):
        return launcher.arm64()

    def test_gcc(self):
        library = self.folder / "gcc.so"
        compiler.compile_library(self.target.compiler, build.SOURCES, library, "-march=armv8-a")
        self.check_with_and_without_openmp(library)

    def test_wheel(self):
        self.check_wheel()


@pytest.mark.slow
class WindowsTest(EmulatedTestCase):
    """The kernels for Windows, under wine."""

    wheel = "win_amd64"

    @classmethod
    def find_target(cls):
        return launcher.windows()

    def test_mingw(self):
        library = self.folder / "mingw.dll"
        compiler.compile_library(self.target.compiler, build.SOURCES, library, "-march=native")
        self.check_with_and_without_openmp(library)

    def test_clang_cl(self):
        try:
            clang_cl = launcher.clang_cl(self.target.compiler, self.folder / "root")
        except launcher.MissingTool as error:
            self.skipTest(str(error))
        library = self.folder / "clang_cl.dll"
        compiler.compile_library(clang_cl, build.SOURCES, library, "-march=native")
        self.check_with_and_without_openmp(library)

    def test_wheel(self):
        self.check_wheel()

    def is_supported(self, library: Path) -> bool:
        level = library.stem.removeprefix("libnatten_cpu-")
        return build.LEVELS_OF["x86_64"][level] <= build.cpu_flags()


if __name__ == "__main__":
    unittest.main()
