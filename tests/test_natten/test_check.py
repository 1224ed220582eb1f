"""python -m natten.check: the report, the checks and the exit status."""

import contextlib
import io
import os
import unittest
from unittest import mock

from natten import check
from natten.backends.cpu import build
from natten.backends.self_check import CheckRow


class CheckTest(unittest.TestCase):
    def run_main(self, *rows: CheckRow) -> tuple[int, dict[str, list[str]]]:
        """Run the command, with these results of the kernels, and return the exit status and the lines by name."""
        out = io.StringIO()
        results = mock.patch.object(check, "run_self_check", side_effect=lambda name: rows if name == "cpu" else [])
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(out))
            if rows:
                stack.enter_context(results)
            stop = stack.enter_context(self.assertRaises(SystemExit))
            check.main([])
        lines: dict[str, list[str]] = {}
        for line in out.getvalue().splitlines():
            lines.setdefault(line[:14].strip(), []).append(line[14:])
        return int(stop.exception.code or 0), lines

    def test_this_machine(self):
        status, lines = self.run_main()
        self.assertEqual(status, 0, lines)
        self.assertLessEqual({"natten", "Python", "PyTorch", "CPU", "threads", "compiler", "CUDA driver"}, lines.keys())
        self.assertIn(str(build.find().path), lines["CPU kernels"][0])
        self.assertGreater(len(lines["cpu check"]), 1)
        for line in lines["cpu check"]:
            self.assertIn("passed", line)

    def test_exit_status(self):
        passed = CheckRow("forward", "passed", "", 1e-7, 0.1)
        for row, expected in (
            (passed, 0),
            (passed._replace(verdict="failed", detail="wrong"), 1),
            (passed._replace(verdict="unavailable", detail="no compiler", largest_error=None), 1),
        ):
            status, lines = self.run_main(passed, row)
            self.assertEqual(status, expected)
            self.assertIn(row.detail, lines["cpu check"][1])

    def test_a_fact_that_cannot_be_found_is_a_line(self):
        with mock.patch.dict(check._FACTS, {"CPU": mock.Mock(side_effect=OSError("no file"))}):
            _, lines = self.run_main(CheckRow("forward", "passed", "", 1e-7, 0.1))
        self.assertIn("no file", lines["CPU"][0])

    def test_no_library(self):
        with mock.patch.object(build, "find", side_effect=build.Unavailable("install g++")):
            _, lines = self.run_main(CheckRow("cpu", "unavailable", "install g++", None, 0.0))
        self.assertIn("install g++", lines["CPU kernels"][0])

    def test_variables(self):
        with mock.patch.dict(os.environ, NATTEN_CACHE_DIR="/made/up", SECRET_TOKEN="1"):
            _, lines = self.run_main(CheckRow("forward", "passed", "", 1e-7, 0.1))
        self.assertIn("NATTEN_CACHE_DIR=/made/up", lines["variable"])
        self.assertFalse([line for line in lines["variable"] if "SECRET" in line])


if __name__ == "__main__":
    unittest.main()
