"""python -m natten.profiler: plans, measurements and errors."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from unittest import mock

import pytest
import torch

import natten
from natten import profiler
from natten.backends import cuda
from natten.backends.cpu.build import cpu_library
from natten.profiler import Limits, Timer, Work

PUBLISHED = "--size 56x56 --batch 128 --heads 2 --head-dim 32 --kernel-size 7 --dtype bfloat16"
CPU = torch.device("cpu")


@pytest.fixture
def run(capsys):
    """Return a function that runs the command and returns what it prints."""

    def run(options: str) -> str:
        profiler.main(options.split())
        return capsys.readouterr().out

    return run


@pytest.fixture
def result(run):
    """Return a function that runs the command and returns its JSON."""
    return lambda options: json.loads(run(f"{options} --json"))


@pytest.fixture
def dry_run(result):
    """Return a function that plans for a GPU of a compute capability."""
    return lambda capability, options: result(f"{options} --dry-run --capability {capability}")


# ----- dry runs -------------------------------------------------------------------------------------------------------


def test_kernels_of_a_gpu(dry_run):
    found = dry_run("9.0", f"{PUBLISHED} --rpb --backward")
    assert (found["backend"], found["passes"]) == ("cuda", [])
    names = ["attention_tiles", "grad_query_tiles", "grad_key_value_tiles", "sum_parts"]
    assert [kernel["kernel"] for kernel in found["kernels"]] == names
    forward = found["kernels"][0]
    rows, columns = map(int, forward["tile"].split("x")[1:])
    assert forward["blocks"] == 128 * 2 * -(-56 // rows) * -(-56 // columns)
    assert forward["shared_bytes"] <= 227 << 10


def test_kernels_depend_on_the_gpu(dry_run):
    assert [x["kernel"] for x in dry_run("7.5", PUBLISHED)["kernels"]] == ["attention"]
    shared = [dry_run(capability, PUBLISHED)["kernels"][0]["shared_bytes"] for capability in ("8.6", "9.0")]
    assert shared[0] <= 99 << 10
    assert shared[0] < shared[1]
    found = dry_run("7.0", PUBLISHED)
    assert (found["backend"], found["kernels"]) == ("reference", [])
    assert "7.0" in found["reasons"]["cuda"]


@pytest.mark.parametrize("capability", profiler.GPUS)
def test_every_known_gpu(dry_run, capability):
    found = dry_run("{}.{}".format(*capability), PUBLISHED)
    assert found["backend"] == ("cuda" if capability >= cuda.MIN_CAPABILITY else "reference")


def test_minimal_work(result):
    """Two products forward, five backward; four maps moved forward, eight backward."""
    work = result("-i 9 -b 2 -n 3 -d 8 -w 3 --backward --dry-run")["work"]
    map_bytes, product = 2 * 9 * 3 * 8 * 4, 2 * 2 * 9 * 3 * 3 * 8
    assert work["forward"]["gflop"] * 1e9 == pytest.approx(2 * product)
    assert work["backward"]["gflop"] * 1e9 == pytest.approx(5 * product)
    assert work["forward"]["gbytes"] * 1e9 == pytest.approx(4 * map_bytes)
    assert work["backward"]["gbytes"] * 1e9 == pytest.approx(8 * map_bytes)


def test_the_problem_as_the_backend_receives_it(dry_run):
    options = "-i 9x10 -n 4 --heads-kv 2 -d 8 --dim-value 16 -w 3x5 --add-kv 4 --window-padding zeros"
    found = dry_run("8.0", options)
    assert found["query_shape"] == [1, 9 + 2, 10 + 4, 4, 8]
    assert found["problem"]["kernel_size"] == [3, 5]


def test_causal_axes(dry_run):
    for option, expected in (("", [False, False]), ("-c", [True, True]), ("-c 1", [False, True])):
        assert dry_run("8.0", f"-i 9x10 -w 3 {option}")["problem"]["is_causal"] == expected


def test_the_cpu(result):
    found = result("-i 9 -w 3 -d 5 --dtype float64 --dry-run --device cpu")
    assert (found["backend"], list(found["reasons"])) == ("reference", ["cpu", "cuda"])
    assert "float64" in found["reasons"]["cpu"]
    with natten.use_backend("reference"):
        found = result("-i 9 -w 3 -d 8 --dry-run --device cpu")
    assert (found["backend"], found["reasons"]) == ("reference", {})


def test_the_report_has_the_figures_of_the_json(run, dry_run):
    options = f"{PUBLISHED} --backward"
    text, found = run(f"{options} --dry-run --capability 9.0"), dry_run("9.0", options)
    assert found["backend"] in text.splitlines()[0]
    for kernel in found["kernels"]:
        (row,) = [line.split() for line in text.splitlines() if line.split()[0] == kernel["kernel"]]
        assert row[:4] == [str(kernel[name]) for name in ("kernel", "blocks", "threads", "shared_bytes")]
    for name, work in found["work"].items():
        (line,) = [line for line in text.splitlines() if f"{name}:" in line]
        assert f"{work['gflop']:.4g}" in line
        assert f"{1e3 * work['gbytes']:.4g}" in line


# ----- measurements ---------------------------------------------------------------------------------------------------


def test_forward_and_backward(result):
    options = "-i 8x9 -n 2 -d 8 -w 3 --rpb -c 1 --backward --repeats 3 --device cpu"
    found = result(options)
    assert [row["pass"] for row in found["passes"]] == ["forward", "backward"]
    for row in found["passes"]:
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["gflops"] == pytest.approx(1e3 * found["work"][row["pass"]]["gflop"] / row["ms"])
        limit = max(row["gflops"] / row["matmul_gflops"], row["gb_s"] / row["copy_gb_s"])
        assert row["percent_of_limit"] == pytest.approx(100 * limit)


def test_the_report_of_a_measurement(run):
    lines = run("-i 9 -w 3 -d 8 --additional 2 --repeats 1 --device cpu --backend reference").splitlines()
    assert "reference" in lines[0]
    assert len(lines[-1].split()) == 9
    assert lines[-1].split()[0] == "forward"


@pytest.mark.parametrize(
    ("dtype", "product"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_limits(monkeypatch, dtype, product):
    monkeypatch.setitem(profiler.MATRIX_SIDE, "cpu", 64)
    monkeypatch.setitem(profiler.COPY_BYTES, "cpu", 2**16)
    assert Limits.product_dtype(dtype, CPU) == product
    limits = Limits(dtype, CPU)
    limits.timers[0].samples_ms, limits.timers[1].samples_ms = [2.0], [0.5]
    assert limits.matmul_gflops == pytest.approx(2e-9 * 64**3 / 2e-3)
    assert limits.copy_gb_s == pytest.approx(2e-9 * 2**16 / 0.5e-3)
    for work in (Work(2 * limits.matmul_gflops, 0.0), Work(0.0, 2 * limits.copy_gb_s)):
        assert limits.percent(work, 4000.0) == pytest.approx(50)


def test_limit_of_arithmetic_on_a_gpu_uses_the_dtype_of_the_problem():
    assert Limits.product_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_median():
    calls = []
    timer = Timer(lambda: calls.append(1), CPU)
    assert timer.median_ms(samples=3) > 0
    assert len(timer.samples_ms) == 3
    assert timer.percentile(0) <= timer.percentile(50) <= timer.percentile(100)


@pytest.mark.parametrize("is_capturable", [True, False])
def test_timer_on_a_gpu(monkeypatch, is_capturable):
    """Calls run from a CUDA graph if it can capture them, and else one by one. The GPU is simulated."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.count = len(calls)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 10.0 * (end.count - self.count)

    @contextlib.contextmanager
    def capture(graph):
        yield
        if not is_capturable:
            raise RuntimeError("capture failed")

    fake = {"Event": Event, "CUDAGraph": Graph, "graph": capture, "Stream": mock.MagicMock()}
    fake |= dict.fromkeys(("current_stream", "synchronize"), mock.MagicMock())
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(profiler, "WARM_UP_S", 0.0)

    others = [lambda: calls.append("other")]
    timer = Timer(lambda: calls.append("one"), torch.device("cuda:0"), others)
    timer.warm_up()
    calls.clear()
    timer.sample()
    assert set(calls) == ({"replay"} if is_capturable else {"one", "other"})
    assert timer.samples_ms == [5.0 if is_capturable else 10.0]  # milliseconds per call


# ----- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("dilation", "-i 9 -w 3 --dilation 4"),
        ("float64", "-i 9 -w 3 --dtype float64 --backend cpu --device cpu"),
        ("--size", "-i 5x5x5x5 -w 3"),
        ("--causal", "-i 9 -w 3 -c 1"),
        ("--size", "-i nine -w 3"),
        ("--batch", "-i 9 -w 3 -b 0"),
        ("--kernel-size", "-i 9"),
        ("--capability", "-i 9 -w 3 --capability 9.0"),
        ("--capability", "-i 9 -w 3 --capability 3.5 --dry-run"),
        ("'cpu'", "-i 9 -w 3 --backend cpu --capability 9.0 --dry-run"),
        ("--size", "-i 100000x100000 -w 3 -d 256 -n 100 --device cpu"),
        pytest.param(
            "--device cuda",
            "-i 9 -w 3 --device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_errors_are_one_line(capsys, named, options):
    with pytest.raises(SystemExit) as ended:
        profiler.main(options.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_the_command():
    cpu_library()  # compiled here, because the first compilation is announced on stderr
    options = "-i 9 -w 3 -d 8 --dry-run --device cpu --json"
    command = [sys.executable, "-m", "natten.profiler", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["problem"]["space"] == [9]
