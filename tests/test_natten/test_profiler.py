"""python -m natten.profiler: what it says would run, what it measures, and how it ends on mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import unittest

import torch

import natten
from natten import profiler
from natten.backends import cuda

PUBLISHED = "--size 56x56 --batch 128 --heads 2 --head-dim 32 --kernel-size 7 --dtype bfloat16"


def run(options: str) -> str:
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        profiler.main(options.split())
    return out.getvalue()


def told(options: str) -> dict:
    return json.loads(run(f"{options} --json"))


class DryRunTest(unittest.TestCase):
    """Nothing is computed."""

    def on(self, capability: str, options: str) -> dict:
        return told(f"{options} --dry-run --capability {capability}")

    def test_kernels_of_a_gpu(self):
        found = self.on("9.0", f"{PUBLISHED} --rpb --backward")
        self.assertEqual((found["backend"], found["passes"]), ("cuda", []))
        names = ["attention_tiles", "grad_query_tiles", "grad_key_value_tiles", "sum_parts"]
        self.assertEqual([kernel["kernel"] for kernel in found["kernels"]], names)
        forward = found["kernels"][0]
        rows, columns = map(int, forward["tile"].split("x")[1:])
        self.assertEqual(forward["blocks"], 128 * 2 * -(-56 // rows) * -(-56 // columns))
        self.assertLessEqual(forward["shared_bytes"], 227 << 10)

    def test_the_gpu_decides(self):
        self.assertEqual([x["kernel"] for x in self.on("7.5", PUBLISHED)["kernels"]], ["attention"])
        shared = [self.on(c, PUBLISHED)["kernels"][0]["shared_bytes"] for c in ("8.6", "9.0")]
        self.assertLessEqual(shared[0], 99 << 10)
        self.assertLess(shared[0], shared[1])
        found = self.on("7.0", PUBLISHED)
        self.assertEqual((found["backend"], found["kernels"]), ("reference", []))
        self.assertIn("7.0", found["reasons"]["cuda"])

    def test_every_gpu_that_is_known(self):
        for major, minor in profiler._GPUS:
            found = self.on(f"{major}.{minor}", PUBLISHED)
            self.assertEqual(found["backend"], "cuda" if (major, minor) >= cuda.LEAST_CAPABILITY else "reference")

    def test_work(self):
        """As the definition has it: two products forward, five backward; four maps moved, then eight."""
        work = told("-i 9 -b 2 -n 3 -d 8 -w 3 --backward --dry-run")["work"]
        map_bytes, product = 2 * 9 * 3 * 8 * 4, 2 * 2 * 9 * 3 * 3 * 8
        self.assertAlmostEqual(work["forward"]["gflop"] * 1e9, 2 * product)
        self.assertAlmostEqual(work["backward"]["gflop"] * 1e9, 5 * product)
        self.assertAlmostEqual(work["forward"]["gbytes"] * 1e9, 4 * map_bytes)
        self.assertAlmostEqual(work["backward"]["gbytes"] * 1e9, 8 * map_bytes)

    def test_a_problem_as_the_backend_gets_it(self):
        options = "-i 9x10 -n 4 --heads-kv 2 -d 8 --dim-value 16 -w 3x5 --add-kv 4 --window-padding zeros"
        found = self.on("8.0", options)
        self.assertEqual(found["query_shape"], [1, 9 + 2, 10 + 4, 4, 16])
        self.assertEqual(found["problem"]["kernel_size"], [3, 5])

    def test_on_the_cpu(self):
        found = told("-i 9 -w 3 -d 5 --dry-run --device cpu")
        self.assertEqual((found["backend"], list(found["reasons"])), ("reference", ["cpu", "cuda"]))
        self.assertIn("head_dim 5", found["reasons"]["cpu"])
        with natten.use_backend("reference"):
            found = told("-i 9 -w 3 -d 8 --dry-run --device cpu")
        self.assertEqual((found["backend"], found["reasons"]), ("reference", {}))

    def test_the_report(self):
        lines = run(f"{PUBLISHED} --dry-run --capability 9.0").splitlines()
        self.assertIn("cuda takes a map of 56x56 with 2 heads of 32, torch.bfloat16, on a GPU of compute", lines[0])
        self.assertRegex(lines[2], r"attention_tiles +\d+ +\d+ +\d+ +1x")
        self.assertEqual(lines[-1], "forward: at least 5.035 GFLOP, 205.5 MB")


class MeasureTest(unittest.TestCase):
    """Small problems, for real."""

    def test_forward_and_backward(self):
        options = "-i 8x9 -n 2 -d 8 -w 3 --rpb -c 1 --backward --repeats 3 --device cpu"
        forward, backward = told(options)["passes"]
        self.assertEqual((forward["pass"], backward["pass"]), ("forward", "backward"))
        for row in (forward, backward):
            self.assertTrue(0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"])
            self.assertGreater(row["percent_of_limit"], 0)
            self.assertGreater(row["matmul_gflops"], row["gflops"])

    def test_the_report(self):
        options = "-i 9 -w 3 -d 8 --additional 2 --repeats 1 --device cpu --backend reference"
        lines = run(options).splitlines()
        self.assertRegex(lines[0], "^reference takes a map of 9 with 1 heads of 8, torch.float32, on .* threads$")
        self.assertRegex(lines[-2], "pass +ms .* percent of limit$")
        self.assertRegex(lines[-1], r"forward +\d+\.\d{3} ")
        self.assertEqual(len(lines), 3)


class MistakesTest(unittest.TestCase):
    """One sentence, and status 2."""

    def check(self, words: str, options: str) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as error, self.assertRaises(SystemExit) as ended:
            run(options)
        self.assertEqual(ended.exception.code, 2)
        self.assertRegex(error.getvalue(), f"^error: .*{words}.*\n$")

    def test_mistakes(self):
        for words, options in {
            "3 \\* 4 = 12 on axis 0": "-i 9 -w 3 --dilation 4",
            "head_dim": "-i 9 -w 3 -d 12 --backend cpu --device cpu",
            "1 to 3 positive": "-i 5x5x5x5 -w 3",
            "axes 0 to 0": "-i 9 -w 3 -c 1",
            "invalid number": "-i nine -w 3",
            "invalid positive number": "-i 9 -w 3 -b 0",
            "required: -w/--kernel-size": "-i 9",
            "goes with --dry-run": "-i 9 -w 3 --capability 9.0",
            "one of 7.0, 7.5": "-i 9 -w 3 --capability 3.5 --dry-run",
            "on cuda": "-i 9 -w 3 --backend cpu --capability 9.0 --dry-run",
            "does not fit into the memory of cpu": "-i 100000x100000 -w 3 -d 256 -n 100 --device cpu",
        }.items():
            with self.subTest(words):
                self.check(words, options)

    @unittest.skipIf(torch.cuda.is_available(), "there is a GPU")
    def test_no_gpu(self):
        self.check("no CUDA device here", "-i 9 -w 3 --device cuda")

    def test_as_a_command(self):
        options = "-i 9 -w 3 -d 8 --dry-run --device cpu"
        command = [sys.executable, "-m", "natten.profiler", *options.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("takes a map of 9", done.stdout)
