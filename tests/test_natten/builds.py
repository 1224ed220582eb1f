"""A test case for the tests of natten.backends.cpu.build, with temporary folders and small sources."""

import contextlib
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from natten.backends.cpu import build

ABI_CPP = """
#include "export.h"
EXPORT int natten_abi() { return %d; }
"""
THREADS_CPP = """
#include <atomic>
#include "export.h"
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
static Team team = nullptr;
EXPORT void natten_use_openmp(void* function, void*, void*, void*) { team = reinterpret_cast<Team>(function); }
EXPORT int threads(int n) {
  std::atomic<int> count{0};
  if (team) team([](void* count) { ++*static_cast<std::atomic<int>*>(count); }, &count, n, 0);
  return count;
}
"""
EXPORT_H = '#define EXPORT extern "C" __attribute__((visibility("default")))\n'


class BuildTestCase(unittest.TestCase):
    """A test case with temporary folders, small sources, and an environment that points to them."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp()).resolve()
        self.addCleanup(shutil.rmtree, self.folder)
        self.cache, self.next_cache = self.folder / "cache", self.folder / "xdg" / "natten"
        self.scratch = self.folder / "scratch"
        self.scratch.mkdir()
        self.sources = self.folder / "sources"
        self.sources.mkdir()
        self.write_sources(build.ABI)
        environment = {"NATTEN_CACHE_DIR": str(self.cache), "XDG_CACHE_HOME": str(self.folder / "xdg"), "CXX": ""}
        self.patch(mock.patch.dict(os.environ, environment))
        self.patch(mock.patch.dict(sys.modules, ziglang=None))  # as if it were not installed
        self.patch(mock.patch.object(tempfile, "tempdir", str(self.scratch)))
        self.patch(mock.patch.object(build, "SHIPPED", self.folder / "lib"))
        self.patch(mock.patch.object(build, "SOURCES", self.sources))

    def patch(self, patcher):
        patcher.start()
        self.addCleanup(patcher.stop)

    def write_sources(self, abi: int):
        (self.sources / "abi.cpp").write_text(ABI_CPP % abi)
        (self.sources / "threads.cpp").write_text(THREADS_CPP)
        (self.sources / "export.h").write_text(EXPORT_H)

    def command(self, name: str, script: str) -> str:
        """Create a compiler that reports the version of c++ and otherwise runs a shell script; return its path."""
        path = self.folder / name
        query = f"case $1 in --version | -dumpmachine) exec {shutil.which('c++')} $1 ;; esac"
        path.write_text(f"#!/bin/sh\n{query}\n{script}\n")
        path.chmod(0o700)
        return str(path)

    @contextlib.contextmanager
    def warns(self, *texts: str):
        """Check that there is one warning per text that contains it, apart from the start of compilation."""
        with self.assertLogs("natten", "WARNING") as logged:
            yield
        lines = [line for line in logged.output if "compiling" not in line]
        self.assertEqual(len(lines), len(texts), lines)
        for line, text in zip(lines, texts, strict=True):
            self.assertRegex(line, text)

    def check_compiles(self) -> build.Found:
        """Find the library, and check that this compiles it, prints one line, and leaves no temporary files."""
        with self.assertLogs("natten", "WARNING") as logged:
            found = build.find()
        self.assertEqual(sum("compiling" in line for line in logged.output), 1)
        self.assertEqual(found.library.natten_abi(), build.ABI)
        self.assertEqual(list(self.scratch.iterdir()), [])
        return found

    def check_cached(self, path: Path):
        """Check that the library is found at a path without compiling and without warnings."""
        with self.assertNoLogs("natten", "INFO"):
            found = build.find()
        self.assertEqual((found.path, found.library.natten_abi()), (path, build.ABI))
