"""natten.build in one process: what is loaded, compiled and kept, and what happens where that cannot be."""

import errno
import os
import re
import tempfile
from pathlib import Path
from unittest import mock

from natten.backends import cache
from natten.backends.cpu import build, compiler
from test_natten.builds import EXPORT_H, BuildTestCase


class KeptTest(BuildTestCase):
    """A library in the cache, and one that cannot be used."""

    def test_compiled_once(self):
        path = self.check_compiles().path
        self.assertRegex(str(path), rf"^{self.cache}/libnatten_cpu-[0-9a-f]{{16}}\.so$")
        self.assertEqual(self.cache.stat().st_mode & 0o777, 0o700)
        self.check_kept(path)

    def test_only_looking_makes_nothing(self):
        with self.assertRaisesRegex(build.Unavailable, "not compiled yet"):
            build.find(may_compile=False)
        self.assertFalse(self.cache.exists())
        path = build.find().path
        self.assertEqual(build.find(may_compile=False).path, path)

    def test_other_sources(self):
        path = build.find().path
        (self.sources / "export.h").write_text(EXPORT_H + "\n")
        self.assertNotEqual(self.check_compiles().path, path)

    def test_another_cpu(self):
        path = build.find().path
        with mock.patch.object(build, "cpu_flags", return_value=build.cpu_flags() | {"made_up"}):
            other = self.check_compiles().path
            self.check_kept(other)
        self.assertNotEqual(other, path)
        self.check_kept(path)

    def test_another_compiler(self):
        path = build.find().path
        with mock.patch.dict(os.environ, CXX="c++ -DMADE_UP"):
            found = build.find()
            self.assertEqual(found.path, path)  # of the next compiler; $CXX need not compile for that
            path.unlink()
            self.assertNotEqual(self.check_compiles().path, path)

    def test_damaged(self):
        path = build.find().path
        content = path.read_bytes()
        for damaged in (b"", b"nonsense", content[: len(content) // 2], content[:-1], content[:-50] + bytes(50)):
            with self.subTest(size=len(damaged)):
                path.unlink()
                path.write_bytes(damaged)
                self.assertEqual(self.check_compiles().path, path)
                self.check_kept(path)

    def test_whole_but_no_library_or_another_abi(self):
        name = build.find().path.name
        self.write_sources(build.ABI + 1)
        other_abi = self.folder / "other.so"
        compiler.compile_library(compiler.find_compilers()[0], self.sources, other_abi)
        self.write_sources(build.ABI)
        for file in (other_abi, self.sources / "abi.cpp"):
            folder = self.folder / f"cache of {file.name}"  # a path that was loaded before would not be read again
            folder.mkdir(mode=0o700)
            cache.store(file, folder / name)
            with self.subTest(file.name), mock.patch.dict(os.environ, NATTEN_CACHE_DIR=str(folder)):
                self.assertEqual(self.check_compiles().path, folder / name)
                self.check_kept(folder / name)

    def test_sources_of_another_abi(self):
        self.write_sources(build.ABI + 1)
        with self.assertRaisesRegex(build.Unavailable, f"ABI is {build.ABI + 1}, but must be {build.ABI}"):
            build.find()

    def test_read_only_folder_that_has_it(self):
        path = build.find().path
        (self.cache / ".lock").unlink()
        self.cache.chmod(0o500)
        self.addCleanup(self.cache.chmod, 0o700)
        self.check_kept(path)
        self.assertEqual(list(self.cache.iterdir()), [path])


class FolderTest(BuildTestCase):
    """Folders that cannot keep a library: the next one does, and the reason is said once."""

    def check_next(self, folder: Path | str, reason: str):
        """NATTEN_CACHE_DIR is refused with one warning each time; the library is in the next folder."""
        with mock.patch.dict(os.environ, NATTEN_CACHE_DIR=str(folder)):
            with self.warns(f"{folder} cannot keep the CPU kernels: .*{reason}"):
                path = build.find().path
            self.assertEqual(path.parent, self.next_cache)
            self.assertEqual(self.next_cache.stat().st_mode & 0o777, 0o700)

    def test_unset(self):
        with mock.patch.dict(os.environ, NATTEN_CACHE_DIR=""):
            self.assertEqual(self.check_compiles().path.parent, self.next_cache)

    def test_home(self):
        for void in ("", "relative"):
            with mock.patch.dict(os.environ, NATTEN_CACHE_DIR="", XDG_CACHE_HOME=void, HOME=str(self.folder / "home")):
                if void:
                    with self.warns("no folder can keep"):
                        self.assertIsNone(build.find().path)
                else:
                    self.assertEqual(build.find().path.parent, self.folder / "home" / ".cache" / "natten")

    def test_others_may_write(self):
        for mode in (0o777, 0o770, 0o1777):
            with self.subTest(oct(mode)):
                self.cache.mkdir(exist_ok=True)
                self.cache.chmod(mode)
                self.check_next(self.cache, "others may write into it; chmod go-w")
                self.assertEqual(list(self.cache.iterdir()), [])

    def test_of_another_user(self):
        folder = Path("/usr")
        if os.geteuid() == 0:  # to whom /usr may belong
            folder = self.cache
            folder.mkdir()
            os.chown(folder, 65534, -1)
        self.check_next(folder, "it belongs to another user")

    def test_noexec(self):
        real, noexec = os.statvfs, mock.Mock(f_flag=os.ST_NOEXEC)
        with mock.patch.object(os, "statvfs", lambda path: noexec if path == self.cache else real(path)):
            self.check_next(self.cache, "noexec")

    def test_read_only(self):
        (self.folder / "file").touch()
        self.check_next(self.folder / "file", "it is not a folder")
        self.check_next(self.folder / "file" / "cache", "Not a directory")

    def test_read_only_file_system(self):
        real = os.open

        def read_only(path, *args, **named) -> int:
            if Path(path).parent == self.cache:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return real(path, *args, **named)

        with mock.patch.object(os, "open", read_only):
            self.check_next(self.cache, "Read-only file system")

    def test_full(self):
        real, calls = os.fsync, []

        def full_at_first(descriptor: int):
            calls.append(descriptor)
            if len(calls) == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        with mock.patch.object(os, "fsync", full_at_first):
            self.check_next(self.cache, "No space left on device")
        self.assertEqual([path.name for path in self.cache.iterdir()], [".lock"])

    def test_none(self):
        (self.folder / "file").touch()
        nowhere = {"NATTEN_CACHE_DIR": str(self.folder / "file" / "a"), "XDG_CACHE_HOME": str(self.folder / "file")}
        with mock.patch.dict(os.environ, nowhere):
            with self.warns("Not a directory", "Not a directory", "each process compiles them again: set NATTEN_CACHE"):
                found = build.find()
            self.assertIsNone(found.path)
            self.assertEqual((found.library.natten_abi(), list(self.scratch.iterdir())), (build.ABI, []))
            with self.assertRaisesRegex(build.Unavailable, "need a temporary folder: .*TMPDIR"):
                os_error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found")
                with mock.patch.object(tempfile, "mkdtemp", side_effect=os_error):
                    build.find()


class CompilerTest(BuildTestCase):
    """Compilers that are not there, or that fail."""

    def test_cxx_comes_first(self):
        mine = self.command("mine", 'exec c++ "$@"')
        with mock.patch.dict(os.environ, CXX=f"{mine} -DMADE_UP"):
            self.assertIn(f"compiled by {mine} -DMADE_UP (c++", self.check_compiles().origin)

    def test_cxx_is_nonsense(self):
        for nonsense, reason in (("no-such-program", "no such program"), ("c++ '", "quotation"), ("false", "status 1")):
            with self.subTest(nonsense), mock.patch.dict(os.environ, CXX=nonsense):
                with self.warns(f"CXX={re.escape(nonsense)} is no compiler that runs: .*{reason}"):
                    found = build.find()
                self.assertIn("/c++ (", found.origin)

    def test_a_compiler_that_fails(self):
        broken = self.command("broken", "echo nothing much >&2; echo 'x.cpp:1: error: out of luck' >&2; exit 3")
        with mock.patch.dict(os.environ, CXX=broken):
            with self.warns("/broken .* could not compile the CPU kernels: x.cpp:1: error: out of luck"):
                path = build.find().path
            self.check_kept(path)

    def test_no_compiler(self):
        with mock.patch.dict(os.environ, PATH=str(self.folder)):
            for may_compile in (True, False):
                with self.assertRaisesRegex(build.Unavailable, "no C\\+\\+ compiler was found.*install g\\+\\+"):
                    build.find(may_compile=may_compile)

    def test_sources_that_do_not_compile(self):
        (self.sources / "abi.cpp").write_text("int natten_abi() {\n  return nothing; }\n")
        reason = r"/c\+\+ .*abi.cpp:2:10: error: .nothing. was not declared.*another compiler with CXX"
        with self.assertRaisesRegex(build.Unavailable, reason):
            build.find()
        self.assertEqual([path.name for path in self.cache.iterdir()], [".lock"])

    def test_no_sources(self):
        with self.assertRaisesRegex(
            build.Unavailable, "sources of the CPU kernels are not in .*: install natten again"
        ):
            build.find(self.folder / "nowhere")


class OpenMPTest(BuildTestCase):
    """Parallel regions run on PyTorch's threads, or there are none."""

    def test_openmp(self):
        self.assertEqual(build.find().library.threads(1), 1)

    def test_a_compiler_without_openmp(self):
        script = (
            'for word in "$@"; do [ "$word" = -fopenmp ] && { echo error: -fopenmp >&2; exit 1; }; done; exec c++ "$@"'
        )
        with mock.patch.dict(os.environ, CXX=self.command("without", script)):
            self.assertEqual(self.check_compiles().library.threads(1), 0)

    def test_pytorch_without_openmp(self):
        with mock.patch.object(compiler, "share_openmp", return_value=None):
            self.assertEqual(build.find().library.threads(1), 0)


class ShippedTest(BuildTestCase):
    """Libraries that a platform wheel brings."""

    def setUp(self):
        super().setUp()
        self.levels = list(build.LEVELS)
        build.SHIPPED.mkdir()

    def cpu(self, level: str):
        """Lets this CPU be of a level."""
        return mock.patch.object(build, "cpu_flags", return_value=build.LEVELS[level])

    def ship(self, *levels: str, abi: int = build.ABI):
        self.write_sources(abi)
        for level in levels:
            target = build.SHIPPED / f"libnatten_cpu-{level}.so"
            compiler.compile_library(compiler.find_compilers()[0], self.sources, target)

    def test_the_best_level_of_this_cpu(self):
        self.ship(*self.levels)
        for level in self.levels:
            with self.subTest(level), self.cpu(level), mock.patch.dict(os.environ, PATH=str(self.folder)):
                self.assertEqual(build.find().path.name, f"libnatten_cpu-{level}.so")

    def test_a_lower_level_is_used_before_compiling(self):
        self.ship(self.levels[-1])
        with self.cpu(self.levels[0]), self.assertLogs("natten", "DEBUG") as logged:
            self.assertEqual(build.find().origin, f"shipped for {self.levels[-1]}")
        self.assertIn("may be faster", logged.output[-1])
        for level, line in zip(self.levels[:-1], logged.output, strict=False):
            self.assertIn(f"no library for {level} was shipped, though this CPU supports it", line)

    def test_one_that_this_cpu_cannot_run(self):
        made_up = {"made-up": frozenset(("zzz", "yyy"))}
        self.ship("made-up")
        with mock.patch.object(build, "LEVELS", made_up), self.assertLogs("natten", "DEBUG") as logged:
            self.assertEqual(build.find().path.parent, self.cache)
        self.assertIn("this CPU lacks yyy zzz", logged.output[0])

    def test_one_of_another_abi(self):
        self.ship(self.levels[-1], abi=build.ABI + 1)
        self.write_sources(build.ABI)
        with self.cpu(self.levels[-1]), self.warns(f"was shipped but cannot be used: its ABI is {build.ABI + 1}"):
            self.assertEqual(build.find().path.parent, self.cache)
