"""natten.backends.cpu.build in one process: what it loads, compiles and caches, and how it falls back."""

import contextlib
import errno
import os
import re
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from natten.backends import cache
from natten.backends.cpu import build, compiler
from test_natten.builds import EXPORT_H, BuildTestCase


class CacheTest(BuildTestCase):
    """A library in the cache, and files there that cannot be used."""

    def test_compiles_once(self):
        path = self.check_compiles().path
        self.assertRegex(str(path), rf"^{self.cache}/libnatten_cpu-[0-9a-f]{{16}}\.so$")
        self.assertEqual(self.cache.stat().st_mode & 0o777, 0o700)
        self.check_cached(path)

    def test_search_without_compiling_creates_nothing(self):
        with self.assertRaises(build.Unavailable):
            build.find(may_compile=False)
        self.assertFalse(self.cache.exists())
        path = build.find().path
        self.assertEqual(build.find(may_compile=False).path, path)

    def test_changed_sources(self):
        path = build.find().path
        (self.sources / "export.h").write_text(EXPORT_H + "\n")
        self.assertNotEqual(self.check_compiles().path, path)

    def test_another_cpu(self):
        path = build.find().path
        with mock.patch.object(build, "cpu_flags", return_value=build.cpu_flags() | {"made_up"}):
            other = self.check_compiles().path
            self.check_cached(other)
        self.assertNotEqual(other, path)
        self.check_cached(path)

    def test_another_compiler(self):
        path = build.find().path
        with mock.patch.dict(os.environ, CXX="c++ -DMADE_UP"):
            found = build.find()
            self.assertEqual(found.path, path)  # by the next compiler; a cached library needs no compilation by $CXX
            path.unlink()
            self.assertNotEqual(self.check_compiles().path, path)

    def test_damaged_file(self):
        path = build.find().path
        content = path.read_bytes()
        for damaged in (b"", b"nonsense", content[: len(content) // 2], content[:-1], content[:-50] + bytes(50)):
            with self.subTest(size=len(damaged)):
                path.unlink()
                path.write_bytes(damaged)
                self.assertEqual(self.check_compiles().path, path)
                self.check_cached(path)

    def test_complete_file_that_is_no_library_or_has_another_abi(self):
        name = build.find().path.name
        self.write_sources(build.ABI + 1)
        other_abi = self.folder / "other.so"
        compiler.compile_library(compiler.find_compilers()[0], self.sources, other_abi)
        self.write_sources(build.ABI)
        for file in (other_abi, self.sources / "abi.cpp"):
            folder = self.folder / f"cache of {file.name}"  # the loader would not read a path again
            folder.mkdir(mode=0o700)
            cache.store(file, folder / name)
            with self.subTest(file.name), mock.patch.dict(os.environ, NATTEN_CACHE_DIR=str(folder)):
                self.assertEqual(self.check_compiles().path, folder / name)
                self.check_cached(folder / name)

    def test_sources_with_another_abi(self):
        self.write_sources(build.ABI + 1)
        with self.assertRaisesRegex(build.Unavailable, f"ABI is {build.ABI + 1}"):
            build.find()

    def test_read_only_folder_that_contains_the_library(self):
        path = build.find().path
        (self.cache / ".lock").unlink()
        self.cache.chmod(0o500)
        self.addCleanup(self.cache.chmod, 0o700)
        self.check_cached(path)
        self.assertEqual(list(self.cache.iterdir()), [path])


class FolderTest(BuildTestCase):
    """Folders that cannot hold a library. The next folder is used, with one warning."""

    def check_next(self, folder: Path | str):
        """Check that NATTEN_CACHE_DIR is rejected with one warning, and that the next folder gets the library."""
        with mock.patch.dict(os.environ, NATTEN_CACHE_DIR=str(folder)):
            with self.warns(str(folder)):
                path = build.find().path
            self.assertEqual(path.parent, self.next_cache)
            self.assertEqual(self.next_cache.stat().st_mode & 0o777, 0o700)

    def test_no_cache_dir(self):
        with mock.patch.dict(os.environ, NATTEN_CACHE_DIR=""):
            self.assertEqual(self.check_compiles().path.parent, self.next_cache)

    def test_home(self):
        for invalid in ("", "relative"):
            home = {"NATTEN_CACHE_DIR": "", "XDG_CACHE_HOME": invalid, "HOME": str(self.folder / "home")}
            with mock.patch.dict(os.environ, home):
                if invalid:
                    with self.warns("NATTEN_CACHE_DIR"):
                        self.assertIsNone(build.find().path)
                else:
                    self.assertEqual(build.find().path.parent, self.folder / "home" / ".cache" / "natten")

    def test_folder_writable_by_others(self):
        for mode in (0o777, 0o770, 0o1777):
            with self.subTest(oct(mode)):
                self.cache.mkdir(exist_ok=True)
                self.cache.chmod(mode)
                self.check_next(self.cache)
                self.assertEqual(list(self.cache.iterdir()), [])

    def test_folder_of_another_user(self):
        folder = Path("/usr")
        if os.geteuid() == 0:  # root may own /usr
            folder = self.cache
            folder.mkdir()
            os.chown(folder, 65534, -1)
        self.check_next(folder)

    def test_noexec(self):
        real, noexec = os.statvfs, mock.Mock(f_flag=os.ST_NOEXEC)
        with mock.patch.object(os, "statvfs", lambda path: noexec if path == self.cache else real(path)):
            self.check_next(self.cache)

    def test_path_that_cannot_be_a_folder(self):
        (self.folder / "file").touch()
        self.check_next(self.folder / "file")
        self.check_next(self.folder / "file" / "cache")

    def test_read_only_file_system(self):
        real = os.open

        def read_only(path, *args, **named) -> int:
            if path == ".lock" and os.readlink(f"/proc/self/fd/{named['dir_fd']}") == str(self.cache):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return real(path, *args, **named)

        with mock.patch.object(os, "open", read_only):
            self.check_next(self.cache)

    def test_full_disk(self):
        real, calls = os.fsync, []

        def full_at_first(descriptor: int):
            calls.append(descriptor)
            if len(calls) == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        with mock.patch.object(os, "fsync", full_at_first):
            self.check_next(self.cache)
        self.assertEqual([path.name for path in self.cache.iterdir()], [".lock"])

    def test_no_folder(self):
        (self.folder / "file").touch()
        first, second = self.folder / "file" / "a", self.folder / "file"
        with mock.patch.dict(os.environ, NATTEN_CACHE_DIR=str(first), XDG_CACHE_HOME=str(second)):
            with self.warns(str(first), str(second), "NATTEN_CACHE_DIR"):
                found = build.find()
            self.assertIsNone(found.path)
            self.assertEqual((found.library.natten_abi(), list(self.scratch.iterdir())), (build.ABI, []))
            with self.assertRaisesRegex(build.Unavailable, "TMPDIR"):
                os_error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found")
                with mock.patch.object(tempfile, "mkdtemp", side_effect=os_error):
                    build.find()


class PlantedTest(BuildTestCase):
    """Files that somebody else put into the folder while it was open to others."""

    def setUp(self):
        super().setUp()
        self.path = build.find().path
        self.elsewhere = self.folder / "elsewhere.so"

    def check_refused(self, name: str):
        """Check that the folder is skipped with one warning that names the file and says to delete the folder."""
        with self.warns(f"{self.cache} .*{name}.*delete the folder"):
            path = build.find().path
        self.assertEqual(path.parent, self.next_cache)
        path.unlink()

    def test_links(self):
        os.rename(self.path, self.elsewhere)
        for target in (self.elsewhere, self.folder / "missing", "/dev/zero"):
            self.path.symlink_to(target)
            self.check_refused(self.path.name)
            self.path.unlink()

    def test_files_that_are_writable_by_others(self):
        for mode in (0o666, 0o620, 0o602):
            self.path.chmod(mode)
            self.check_refused(self.path.name)

    @unittest.skipIf(os.geteuid() != 0, "only root can give files away")
    def test_files_of_another_user(self):
        os.chown(self.path, 65534, -1)
        self.check_refused(self.path.name)

    def test_what_is_not_a_file(self):
        self.path.unlink()
        os.mkfifo(self.path, 0o600)
        self.check_refused(self.path.name)
        self.path.unlink()
        self.path.mkdir()
        self.check_refused(self.path.name)

    def test_locks(self):
        self.path.unlink()
        lock = self.cache / ".lock"
        lock.unlink()
        precious = self.folder / "precious"
        precious.write_text("keep this")
        lock.symlink_to(precious)
        self.check_refused(lock.name)
        self.assertEqual(precious.read_text(), "keep this")
        lock.unlink()
        os.mkfifo(lock, 0o600)
        self.check_refused(lock.name)

    def test_replaced_after_the_check(self):
        """The file that was checked is loaded, even if its path names another one by then."""
        self.write_sources(build.ABI)
        (self.sources / "threads.cpp").write_text('#include "export.h"\nEXPORT int threads(int) { return 666; }\n')
        compiler.compile_library(compiler.find_compilers()[0], self.sources, self.elsewhere)
        self.write_sources(build.ABI)
        cache.store(self.elsewhere, self.cache / "other.so")
        real = cache.content

        def check_and_replace(descriptor: int) -> bytes | None:
            content = real(descriptor)
            os.replace(self.cache / "other.so", self.path)
            return content

        with mock.patch.object(cache, "content", check_and_replace):
            self.assertNotEqual(build.find().library.threads(1), 666)


class CompilerTest(BuildTestCase):
    """Compilers that are missing or fail."""

    def test_cxx_comes_first(self):
        mine = self.command("mine", 'exec c++ "$@"')
        with mock.patch.dict(os.environ, CXX=f"{mine} -DMADE_UP"):
            self.assertIn(f"{mine} -DMADE_UP", self.check_compiles().origin)

    def test_invalid_cxx(self):
        for nonsense in ("no-such-program", "c++ '", "false"):
            with self.subTest(nonsense), mock.patch.dict(os.environ, CXX=nonsense):
                with self.warns(f"CXX={re.escape(nonsense)}"):
                    found = build.find()
                self.assertIn("/c++ (", found.origin)

    def test_a_failing_compiler_is_reported_with_its_first_error(self):
        broken = self.command("broken", "echo nothing much >&2; echo 'x.cpp:1: error: out of luck' >&2; exit 3")
        with mock.patch.dict(os.environ, CXX=broken):
            with self.warns(r"/broken .*x.cpp:1: error: out of luck"):
                path = build.find().path
            self.check_cached(path)

    def test_zig(self):
        """It compiles for this system's C library, and its a.o is not left in the current folder."""
        zig, here = self.folder / "zig", self.folder / "here"
        zig.write_text("#!/bin/sh\ntouch a.o\necho clang version 20\necho Target: x86_64-unknown-linux-gnu\n")
        zig.chmod(0o700)
        here.mkdir()
        with contextlib.chdir(here):
            found = compiler.query(["../zig", "c++"])
        self.assertEqual(found.command[:3], (str(zig), "c++", "-target"))
        self.assertRegex(found.command[3], "^[a-z0-9_]+-linux-gnu$")
        self.assertEqual(list(here.iterdir()), [])

    def test_no_compiler(self):
        with mock.patch.dict(os.environ, PATH=str(self.folder)):
            for may_compile in (True, False):
                with self.assertRaisesRegex(build.Unavailable, r"g\+\+.*CXX"):
                    build.find(may_compile=may_compile)

    def test_sources_that_do_not_compile(self):
        (self.sources / "abi.cpp").write_text("int natten_abi() {\n  return nothing; }\n")
        with self.assertRaisesRegex(build.Unavailable, r"/c\+\+ .*abi.cpp:2:10: error: .*CXX"):
            build.find()
        self.assertEqual([path.name for path in self.cache.iterdir()], [".lock"])

    def test_no_sources(self):
        with self.assertRaisesRegex(build.Unavailable, "nowhere"):
            build.find(self.folder / "nowhere")


class OpenMPTest(BuildTestCase):
    """Teams run on PyTorch's threads; without its OpenMP the library gets no functions."""

    def test_openmp(self):
        self.assertEqual(build.find().library.threads(2), 2)

    def test_pytorch_without_openmp(self):
        with mock.patch.object(build, "find_runtime", return_value=None):
            self.assertEqual(build.find().library.threads(2), 0)


class ShippedTest(BuildTestCase):
    """Libraries of a platform wheel."""

    def setUp(self):
        super().setUp()
        self.levels = list(build.LEVELS)
        build.SHIPPED.mkdir()

    def cpu(self, level: str):
        """Let this CPU support exactly one level and those below."""
        return mock.patch.object(build, "cpu_flags", return_value=build.LEVELS[level])

    def ship(self, *levels: str, abi: int = build.ABI):
        self.write_sources(abi)
        for level in levels:
            target = build.SHIPPED / f"libnatten_cpu-{level}.so"
            compiler.compile_library(compiler.find_compilers()[0], self.sources, target)

    def test_the_highest_supported_level_is_used(self):
        self.ship(*self.levels)
        for level in self.levels:
            with self.subTest(level), self.cpu(level), mock.patch.dict(os.environ, PATH=str(self.folder)):
                self.assertEqual(build.find().path.name, f"libnatten_cpu-{level}.so")

    def test_a_lower_level_is_used_before_compiling(self):
        self.ship(self.levels[-1])
        with self.cpu(self.levels[0]), self.assertLogs("natten", "DEBUG") as logged:
            self.assertIn(self.levels[-1], build.find().origin)
        for level, line in zip(self.levels[:-1], logged.output, strict=False):
            self.assertIn(level, line)

    def test_a_level_that_this_cpu_lacks_is_skipped(self):
        made_up = {"made-up": frozenset(("zzz", "yyy"))}
        self.ship("made-up")
        with mock.patch.object(build, "LEVELS", made_up), self.assertLogs("natten", "DEBUG") as logged:
            self.assertEqual(build.find().path.parent, self.cache)
        self.assertIn("yyy zzz", logged.output[0])

    def test_another_abi_is_skipped(self):
        self.ship(self.levels[-1], abi=build.ABI + 1)
        self.write_sources(build.ABI)
        with self.cpu(self.levels[-1]), self.warns(f"{self.levels[-1]}.*ABI is {build.ABI + 1}"):
            self.assertEqual(build.find().path.parent, self.cache)
