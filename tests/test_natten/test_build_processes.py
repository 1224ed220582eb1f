"""natten.backends.cpu.build in several processes and on the real sources, and the command python -m natten.build."""

import contextlib
import ctypes
import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
import threading
import time
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from natten.backends import cache
from natten.backends.cpu import build, compiler, openmp
from natten.build import main
from test_natten.builds import BuildTestCase

TIMEOUT_S = 600  # generous: the machine may be busy
FIND = """
import sys
from pathlib import Path
from natten.backends.cpu import build
print(build.find(Path(sys.argv[1])).path)
"""
CPU_LIBRARY = """
import os, sys, threading
from pathlib import Path
from natten.backends.cpu import build
build.SOURCES = Path(sys.argv[1])
found = []
def find():
    try:
        found.append(build.cpu_library())
    except build.Unavailable as error:
        found.append(str(error))
threads = [threading.Thread(target=find) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
child = os.fork()
find()
if child == 0:
    os._exit(len(set(found)))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(set(found)), found[0])
"""
MAPPED = """
import ctypes, sys, torch
from pathlib import Path
from natten.backends.cpu import build
print(build.find(Path(sys.argv[1])).library.threads(2))
print(*{Path(line.split()[-1]).name for line in open("/proc/self/maps") if "omp" in line.split()[-1].rsplit("/")[-1]})
"""


class ProcessTest(BuildTestCase):
    """Several processes at once, forked and killed processes."""

    def start(self, code: str, **environment: str) -> subprocess.Popen:
        """Start a process that runs code in its own session, with the folder of the sources as argument."""
        environment = {**os.environ, "TMPDIR": str(self.scratch), "NATTEN_LOG_LEVEL": "WARNING", **environment}
        return subprocess.Popen(
            [sys.executable, "-c", code, str(self.sources)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run_code(self, code: str, **environment: str) -> str:
        process = self.start(code, **environment)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        self.assertEqual(process.returncode, 0)
        return output.strip()

    def counting(self) -> tuple[str, Path]:
        """Return a slow compiler, and the file to which it appends one line per source and one for linking."""
        calls = self.folder / "calls"
        return self.command("counting", f'echo "$*" >> {calls}; sleep 0.5; exec c++ "$@"'), calls

    def test_two_processes_compile_once(self):
        mine, calls = self.counting()
        processes = [self.start(FIND, CXX=mine) for _ in range(2)]
        paths = {process.communicate(timeout=TIMEOUT_S)[0].strip() for process in processes}
        self.assertEqual([process.returncode for process in processes], [0, 0])
        (path,) = paths
        self.assertEqual(Path(path).parent, self.cache)
        self.assertEqual(len(calls.read_text().splitlines()), 3)  # two sources and the link, once

    def test_compilation_is_announced_on_stderr(self):
        for level, lines in (("", 1), ("WARNING", 1), ("ERROR", 0)):
            cache = self.folder / f"cache{level}"
            environment = {**os.environ, "NATTEN_LOG_LEVEL": level, "NATTEN_CACHE_DIR": str(cache)}
            for expected in (lines, 0):  # the second process finds the library
                with self.subTest(level, expected=expected):
                    command = [sys.executable, "-c", FIND, str(self.sources)]
                    done = subprocess.run(command, env=environment, capture_output=True, text=True)
                    self.assertEqual((done.returncode, done.stderr.count("\n")), (0, expected), done.stderr)
                    self.assertEqual(done.stderr.count("compiling"), expected)

    def test_two_threads_without_file_locks(self):
        with mock.patch.object(fcntl, "flock", side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))):
            found = []
            threads = [threading.Thread(target=lambda: found.append(build.find())) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual([f.library.natten_abi() for f in found], [build.ABI] * 2)
        self.check_cached(found[0].path)

    def test_waits_as_long_as_the_holder_of_the_lock_lives(self):
        cache.make(self.cache)
        found = []
        thread = threading.Thread(target=lambda: found.append(build.find()))
        with cache.lock(self.cache), self.warns(rf"waiting for process {os.getpid()} .*{self.cache}"):
            with mock.patch.object(cache, "_PATIENCE_S", 0.1), mock.patch.object(cache, "_GRACE_S", 0.1):
                thread.start()
                thread.join(1.5)
            self.assertTrue(thread.is_alive())
            self.assertEqual([path.name for path in self.cache.iterdir()], [".lock"])
        thread.join(TIMEOUT_S)
        self.check_cached(found[0].path)

    def test_a_lock_whose_holder_has_died_is_ignored(self):
        """A child of the holder keeps the file open."""
        cache.make(self.cache)
        holder = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        with cache.lock(self.cache):
            (self.cache / ".lock").write_text(cache._identity(int(holder.stdout)))
            self.assertEqual(self.check_compiles().path.parent, self.cache)

    def test_a_killed_process_leaves_no_lock_and_no_library(self):
        started = self.folder / "started"
        sleeping = self.command("sleeping", f"touch {started}; exec sleep 300")
        process = self.start(FIND, CXX=sleeping)
        while not started.exists():
            self.assertIsNone(process.poll())
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        self.assertEqual([path.name for path in self.cache.iterdir()], [".lock"])
        for leftover in self.scratch.iterdir():
            for path in leftover.iterdir():
                path.unlink()
            leftover.rmdir()
        clock = SimpleNamespace(
            monotonic=time.monotonic, sleep=mock.Mock(side_effect=AssertionError("the lock is held"))
        )
        with mock.patch.object(cache, "time", clock):
            path = self.check_compiles().path
        self.check_cached(path)

    def test_a_forked_child_does_not_delete_the_scratch_folder(self):
        scratch = cache.scratch()
        with scratch as folder:
            child = os.fork()
            if child == 0:
                scratch.__exit__(None, None, None)
                os._exit(0)
            os.waitpid(child, 0)
            self.assertTrue(folder.exists())
        self.assertFalse(folder.exists())

    def test_one_library_for_all_threads_and_children(self):
        mine, calls = self.counting()
        self.assertRegex(self.run_code(CPU_LIBRARY, CXX=mine), "^1 1 <CDLL '.*libnatten_cpu-")
        self.assertEqual(len(calls.read_text().splitlines()), 3)

    def test_a_failure_is_cached(self):
        calls = self.folder / "calls"
        broken = self.command("broken", f"echo >> {calls}; exit 1")
        output = self.run_code(CPU_LIBRARY, CXX=broken, PATH="")
        self.assertRegex(output, "^1 1 .*/broken ")
        self.assertLessEqual(len(calls.read_text().splitlines()), len(list(self.sources.glob("*.cpp"))))

    def test_one_openmp_runtime(self):
        """PyTorch's runtime, under its own file name, is the only one in the process."""
        threads, *runtimes = self.run_code(MAPPED).split()
        self.assertEqual(threads, "2")
        self.assertEqual(runtimes, [openmp.find_runtime().path.name])


class CommandTest(BuildTestCase):
    """python -m natten.build"""

    def run_main(self, *arguments: str) -> tuple[int, str, str]:
        """Return the exit status and the text on stdout and stderr."""
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(list(arguments))
            except SystemExit as stop:
                status = stop.code or 0
        return status, out.getvalue(), err.getvalue()

    def test_for_this_machine(self):
        for check in (self.assertLogs, self.assertNoLogs):  # the second run compiles nothing
            with check("natten", "WARNING"):
                status, out, err = self.run_main()
            self.assertEqual((status, err), (0, ""))
            self.assertRegex(out, rf"^{self.cache}/libnatten_cpu-\w+.so\n.*c\+\+ ")

    def test_ahead_of_time(self):
        out = self.folder / "a" / "b"
        levels = list(build.LEVELS)
        with self.assertLogs("natten", "WARNING"):
            status, printed, err = self.run_main(*(f"--cpu={level}" for level in levels), "--out", str(out))
        self.assertEqual((status, err), (0, ""))
        self.assertEqual(printed.split(), [str(out / f"libnatten_cpu-{level}.so") for level in levels])
        self.assertEqual(sorted(map(str, out.iterdir())), sorted(printed.split()))
        self.assertEqual(ctypes.CDLL(printed.split()[-1]).natten_abi(), build.ABI)
        self.assertFalse(self.cache.exists())

    def test_list(self):
        status, printed, _ = self.run_main("--list")
        self.assertEqual(status, 0)
        for text in (*build.LEVELS, "CXX", str(self.cache), "c++"):
            self.assertIn(text, printed)
        path = build.find().path
        self.assertIn(str(path), self.run_main("--list")[1])

    def test_invalid_arguments(self):
        file = self.folder / "file"
        file.touch()
        level = list(build.LEVELS)[-1]
        for arguments, text in (
            (("--cpu", "z80", "--out", "x"), f"'z80'.*{level}"),
            (("--cpu", level), "--out"),
            (("--out", "x"), "--cpu"),
            (("--list", "--cpu", level, "--out", "x"), "--list"),
            (("--cpu", level, "--out", str(file)), "File exists|Not a directory"),
            (("--nonsense",), "--nonsense"),
        ):
            with self.subTest(arguments):
                status, printed, err = self.run_main(*arguments)
                self.assertEqual((status, printed, err.count("\n")), (2, "", 1))
                self.assertRegex(err, f"^error: .*({text})")

    def test_no_folder_and_no_compiler(self):
        nowhere = {"NATTEN_CACHE_DIR": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
        with mock.patch.dict(os.environ, nowhere), self.assertLogs("natten", "WARNING"):
            status, _, err = self.run_main()
        self.assertEqual((status, err.count("\n")), (2, 1))
        self.assertIn("NATTEN_CACHE_DIR", err)
        with mock.patch.dict(os.environ, PATH=""):
            status, _, err = self.run_main()
        self.assertEqual((status, err.count("\n")), (2, 1))
        self.assertIn("CXX", err)

    def test_as_a_module(self):
        """Importing natten does not import natten.build; otherwise python -m would warn."""
        command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "natten.build", "--list"]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("CPU kernels", done.stdout)


class RealSourcesTest(unittest.TestCase):
    """The real kernels."""

    def test_this_machine(self):
        self.assertEqual(build.cpu_library().natten_abi(), build.ABI)
        self.assertIs(build.cpu_library(), build.cpu_library())

    @pytest.mark.slow
    def test_levels(self):
        """Each level compiles, and those that this CPU supports load."""
        compilers = compiler.find_compilers()
        for level, needed in build.LEVELS.items():
            with self.subTest(level), cache.scratch() as folder:
                target = folder / "library.so"
                compiler.compile_library(compilers[0], build.SOURCES, target, f"-march={level}")
                self.assertGreater(target.stat().st_size, 10_000)
                if needed <= build.cpu_flags():
                    self.assertEqual(ctypes.CDLL(str(target)).natten_abi(), build.ABI)
