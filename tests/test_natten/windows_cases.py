"""The builder and the cache in a Python that lacks what Windows lacks; test_windows.py runs these cases."""

import _ctypes
import contextlib
import os
import subprocess
import sys
import types
import unittest
from pathlib import Path
from unittest import mock

import as_on_windows
import torch

if __name__ == "__main__":  # before natten is imported
    as_on_windows.pretend("torch")

from natten.backends import cache
from natten.backends.cpu import build, compiler, openmp
from test_natten.builds import EXPORT_H, BuildTestCase

OPENMP_CPP = EXPORT_H + "\n".join(f"EXPORT void {name}() {{}}" for name in openmp.FUNCTIONS[1:])
WAIT = "from pathlib import Path; from natten.backends import cache; import sys\n"
WAIT += "with cache.lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


class WindowsTestCase(BuildTestCase):
    """Without NATTEN_CACHE_DIR, and with a profile of its own."""

    def setUp(self):
        super().setUp()
        self.assertEqual(build.SUFFIX, ".dll")
        self.local = self.folder / "Local"
        self.patch(mock.patch.dict(os.environ, LOCALAPPDATA=str(self.local)))
        del os.environ["NATTEN_CACHE_DIR"]


class CacheTest(WindowsTestCase):
    def test_folder(self):
        self.assertEqual(list(cache.folders()), [self.local / "natten"])
        with mock.patch.dict(os.environ, LOCALAPPDATA="", HOME=str(self.folder)):
            self.assertEqual(list(cache.folders()), [self.folder / "AppData" / "Local" / "natten"])

    def test_compiles_once(self):
        path = self.check_compiles().path
        self.assertEqual((path.parent, path.suffix), (self.local / "natten", ".dll"))
        self.check_cached(path)

    def test_damaged_file(self):
        path = self.check_compiles().path
        damaged = path.read_bytes()[:-1]
        path.unlink()  # the file itself is loaded
        path.write_bytes(damaged)
        self.assertEqual(self.check_compiles().path, path)

    def test_another_abi_is_unloaded(self):
        self.write_sources(build.ABI + 1)
        unload = mock.Mock(side_effect=_ctypes.dlclose)
        with (
            mock.patch.object(_ctypes, "FreeLibrary", unload, create=True),
            self.assertRaisesRegex(build.Unavailable, "ABI"),
        ):
            build.find()
        self.assertTrue(unload.called)

    def test_links_and_files_are_not_folders(self):
        """Links have a reparse tag."""
        real = os.lstat

        def status_of_link(path):
            status = real(path)
            return types.SimpleNamespace(st_mode=status.st_mode, st_reparse_tag=0xA000000C)

        (self.local / "natten").mkdir(parents=True)
        with mock.patch.object(os, "lstat", status_of_link), self.warns("is a link", "no folder can hold"):
            self.assertIsNone(build.find().path)
        (self.local / "natten").rmdir()
        (self.local / "natten").touch()
        with self.warns("not a folder", "no folder can hold"):
            self.assertIsNone(build.find().path)

    def test_a_second_process_waits(self):
        cache.make(self.local)
        command = [sys.executable, as_on_windows.__file__, "-c", WAIT, str(self.local)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            self.assertEqual(holder.stdout.readline(), "held\n")
            impatient = mock.patch.object(cache.time, "sleep", side_effect=TimeoutError)
            with self.assertRaises(TimeoutError), impatient, cache.lock(self.local):
                pass
            holder.stdin.close()
            with self.assertNoLogs("natten", "WARNING"), cache.lock(self.local):
                pass


class CompilerTest(WindowsTestCase):
    def clang_cl(self, folder: str) -> Path:
        """Make a clang-cl that accepts only what clang-cl for Microsoft's target takes."""
        path = self.folder / folder / "clang-cl"
        path.parent.mkdir()
        lines = (
            "#!/bin/sh",
            'case "$*" in *-pthread*|*-fPIC*|*-static*) exit 3 ;; *--driver-mode=g++*) ;; *) exit 4 ;; esac',
            'case "$*" in *--version) echo "clang 20"; echo "Target: x86_64-pc-windows-msvc"; exit ;; esac',
            'c++ -fPIC $(echo "$@" | sed s/--driver-mode=g++//)',
        )
        path.write_text("\n".join(lines))
        path.chmod(0o700)
        return path

    def test_clang_cl_in_a_folder_with_spaces(self):
        path = self.clang_cl("Program Files")
        for text in (str(path), f'"{path}"', f'"{path}" -DMADE_UP'):
            with self.subTest(text), mock.patch.dict(os.environ, CXX=text):
                command = compiler.find_compilers()[0].command
                self.assertEqual((command[0], command[-1]), (str(path), "--driver-mode=g++"))
        with mock.patch.dict(os.environ, CXX=str(path)):
            self.assertIn("Program Files/clang-cl", self.check_compiles().origin)

    def test_a_backslash_is_part_of_a_path(self):
        self.assertEqual(compiler._words(r"C:\llvm\clang++.exe -DA"), (r"C:\llvm\clang++.exe", "-DA"))


class OpenMPTest(WindowsTestCase):
    """The DLL next to PyTorch, whose functions are those of Windows' runtime."""

    def find(self, source: str) -> openmp.Runtime | None:
        sources, library = self.folder / "omp", self.folder / "torch" / "lib" / "libiomp5md.dll"
        sources.mkdir(exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            library.unlink()
        (sources / "omp.cpp").write_text(source)
        compiler.compile_library(compiler.find_compilers()[0], sources, library)
        with mock.patch.object(torch, "__file__", str(self.folder / "torch" / "__init__.py")):
            return openmp.find_runtime.__wrapped__()

    def test_runtime(self):
        found = self.find(OPENMP_CPP)
        self.assertEqual(found.path, self.folder / "torch" / "lib" / "libiomp5md.dll")
        self.assertEqual([address is None for address in found.functions], [True, False, False, False])

    def test_runtime_without_a_function(self):
        self.assertIsNone(self.find(OPENMP_CPP.replace("push_num_threads", "another")))

    def test_no_runtime(self):
        with mock.patch.object(torch, "__file__", str(self.folder / "torch" / "__init__.py")):
            self.assertIsNone(openmp.find_runtime.__wrapped__())


if __name__ == "__main__":
    unittest.main()
