"""The benchmark: what it writes, that it compares like with like, and that it refuses what is wrong."""

import csv
import subprocess
import sys
from pathlib import Path

import benchmark
import pytest
import torch
from benchmarks import layers, models, ops, timing
from benchmarks.entry import Entry, LeftOut, Setting, Subject
from benchmarks.memory import peak_mb_in_fresh_process
from benchmarks.report import COLUMNS

from natzoo import command_line

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmark.py"
SETTING = Setting("float32", torch.get_num_threads(), "cpu")
TINY = "b1_8x8_h2_d8_k3"
CASES = (TINY, "b2_13_h1_d8_k3_dil3", "b1_6x7x8_h2_d8_k2x3x2", "b1_9x8_h2_d8_k3_causal", "b1_9x8_h2_d8_k4x2_norpb")
PASSES = ("forward", "forward+backward")


def run(*arguments: object) -> subprocess.CompletedProcess:
    """The real command."""
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_figures(row: dict[str, str]) -> None:
    """Percentiles are ordered, and percentages follow from the other columns."""
    value = {name: float(row[name]) for name in ("p20_ms", "p50_ms", "p80_ms", "gflop", "gemm_gflops", "copy_gb_s")}
    assert 0 < value["p20_ms"] <= value["p50_ms"] <= value["p80_ms"]
    assert min(value["gemm_gflops"], value["copy_gb_s"]) > 0
    expected = 100 * value["gflop"] / (value["p50_ms"] / 1e3) / value["gemm_gflops"]
    assert float(row["percent_of_gemm"]) == pytest.approx(expected, rel=1e-3)
    assert float(row["percent_of_floor"]) >= float(row["percent_of_gemm"])


def entry_of(provider: str, case: str = TINY, pass_name: str = "forward+backward", dtype: str = "float32") -> Entry:
    return Entry("ops", case, case, provider, pass_name, SETTING._replace(dtype=dtype))


# ----- the commands ---------------------------------------------------------------------------------------------------


def test_ops(tmp_path):
    out = tmp_path / "new" / "ops.csv"
    providers = ["natten-cpu", "natten-reference", "sdpa", "gather"]
    done = run("ops", "--case", TINY, "--provider", *providers, "--repeats", 2, "--threads", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing left out, and no progress bar in a pipe
    rows = read(out)
    assert tuple(rows[0]) == COLUMNS
    assert [(row["pass"], row["provider"]) for row in rows] == [(p, name) for p in PASSES for name in providers]
    for row in rows:
        check_figures(row)
        assert (row["kind"], row["case"], row["dtype"], row["threads"], row["n"]) == ("ops", TINY, "float32", "1", "2")
        work = (4 if row["pass"] == "forward" else 14) * 2 * 64 * 9 * 8
        assert float(row["gflop"]) == pytest.approx(work / 1e9, rel=1e-4)
        assert row["peak_memory_mb"] == row["images_per_s"] == ""
        assert row["torch_version"] == torch.__version__
        assert all(row[name] for name in ("timm_version", "natten_version", "cpu_model", "date"))
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["provider", "pass", "case"]
    assert len(lines) == 1 + 1 + len(rows) + 1
    assert lines[-1] == f"wrote {out}"


@pytest.fixture
def quick(monkeypatch):
    """Small measurements of the machine's limits, and a made-up peak memory, which takes a process to measure."""
    monkeypatch.setattr(timing, "GEMM_SIDE", 128)
    monkeypatch.setattr(timing, "COPY_BYTES", 2**20)
    monkeypatch.setattr(benchmark, "peak_mb_in_fresh_process", lambda entry, script: 1.5)


def test_models(tmp_path, quick):
    out = tmp_path / "models.csv"
    cases = ["step_b2_32", "inference_b1_32"]
    benchmark.main(["models", "--case", *cases, "--provider", "test_vit", "--repeats", "2", "--out", str(out)])
    rows = read(out)
    assert [(row["case"], row["pass"]) for row in rows] == [(cases[0], "step"), (cases[1], "inference")]
    for row, batch in zip(rows, (2, 1), strict=True):
        check_figures(row)
        assert (row["kind"], row["provider"], row["peak_memory_mb"]) == ("models", "test_vit", "1.5")
        assert float(row["images_per_s"]) == pytest.approx(batch * 1e3 / float(row["p50_ms"]), rel=1e-3)
    assert float(rows[0]["gflop"]) > 2 * 2 * float(rows[1]["gflop"])  # two images, and twice as much backward


def test_convolutions_with_groups_count_twice_as_much_backward(tmp_path, quick):
    out = tmp_path / "models.csv"
    cases = ["inference_b1_32", "step_b1_32"]
    benchmark.main(["models", "--case", *cases, "--provider", "convnext_atto", "--repeats", "2", "--out", str(out)])
    forward, step = (float(row["gflop"]) for row in read(out))
    stem = 2 * (8 * 8) * 40 * 3 * 4 * 4 / 1e9  # its input needs no gradient
    assert step == pytest.approx(3 * forward - stem, rel=1e-3)


def test_layers(tmp_path, quick):
    out = tmp_path / "layers.csv"
    benchmark.main(["layers", "--case", TINY, "--repeats", "2", "--out", str(out)])
    rows = read(out)
    assert [row["provider"] for row in rows] == 2 * list(layers.PROVIDERS)
    for row in rows:
        check_figures(row)
        assert row["peak_memory_mb"] == "1.5"
        work = 2 * 2 * 64 * 9 * 8 + 4 * 64 * 16 * 16  # multiplications of the operator, and of the projections
        if row["pass"] == "forward+backward":
            work = 7 * 2 * 64 * 9 * 8 + 3 * 4 * 64 * 16 * 16
        assert float(row["gflop"]) == pytest.approx(2 * work / 1e9, rel=1e-4)


def test_memory_is_what_a_call_adds():
    case = "b8_56x56_h2_d32_k7"
    measured = peak_mb_in_fresh_process(Entry("layers", case, case, "natten-cpu", "forward", SETTING), str(SCRIPT))
    assert measured == pytest.approx(5 * 8 * 56 * 56 * 64 * 4 / 1e6, rel=0.2)  # qkv, attention's output, the layer's


def test_list(capsys):
    for kind, module in benchmark.KINDS.items():
        benchmark.main([kind, "--list"])
        shown = capsys.readouterr().out.split()
        assert {*module.GROUPS, *module.PROVIDERS} <= set(shown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("ops --case wibble", "case 'wibble' is unknown"),
        ("ops --case b1_8x8_h2_d8_k9", "kernel_size * dilation is 9 * 1"),
        ("ops --provider natten-cpu wibble", "provider 'wibble' is unknown: use natten-cpu"),
        ("layers --case b1_8_h2_d8_k3", "must have two axes"),
        ("layers --provider gather", "provider 'gather' is unknown: use natten-cpu"),
        ("models --case step_b0_224", "case 'step_b0_224' is unknown"),
        ("models --provider wibble", "provider 'wibble' is unknown"),
        ("ops --device wibble", "device 'wibble' cannot be used here"),
        ("memory models step_b1_32 nat_mini inference", "models has no pass 'inference'"),
        (f"ops --case {TINY} --provider flex_attention --out .", "is a folder"),
    ],
)
def test_user_mistakes_end_in_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        command_line.run(lambda: benchmark.main(arguments.split()))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_nothing_left_to_time(tmp_path, capsys):
    out = tmp_path / "layers.csv"
    with pytest.raises(ValueError, match="nothing could be timed"):
        benchmark.main(["layers", "--case", f"{TINY}_norpb", "--provider", "timm-window", "--out", str(out)])
    assert not out.exists()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["left out"] * 2


# ----- what is compared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", ["natten-cpu", "sdpa", "gather"])
def test_providers_agree_with_the_reference(provider, case):
    for pass_name in PASSES:
        for dtype in ("float32", "bfloat16"):
            subject = ops.make(entry_of(provider, case, pass_name, dtype))
            subject.check(subject.run())


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("case", CASES)
def test_flex_attention_agrees_with_the_reference(case):
    subject = ops.make(entry_of("flex_attention", case, "forward"))
    subject.check(subject.run())
    with pytest.raises(LeftOut, match="no backward pass"):
        ops.make(entry_of("flex_attention", case))


@pytest.mark.parametrize("wrong", range(3))
def test_a_wrong_result_is_refused(wrong):
    subject = ops.make(entry_of("natten-reference"))
    result = [x.detach().clone() for x in subject.run()]
    subject.check(tuple(result))
    result[wrong].view(-1)[5] += 0.01
    with pytest.raises(LeftOut, match="its result is wrong"):
        subject.check(tuple(result))
    result[wrong].view(-1)[5] = float("nan")
    with pytest.raises(LeftOut, match="its result is wrong"):
        subject.check(tuple(result))


def test_what_takes_too_much_memory_is_left_out():
    for provider, case in (("sdpa", "b1_200x304_h2_d32_k7"), ("flex_attention", "b1_200x304_h2_d32_k7")):
        with pytest.raises(LeftOut, match="GiB, more than"):
            ops.make(entry_of(provider, case, "forward"))


def test_work():
    main = ops.parse("b8_56x56_h2_d32_k7")
    tensor_gb = 8 * 56 * 56 * 2 * 32 * 4 / 1e9
    assert main.work("forward", 4) == pytest.approx((0.3147, 4 * tensor_gb), rel=1e-4)
    assert main.work("forward+backward", 4) == pytest.approx((0.3147 * 3.5, 12 * tensor_gb), rel=1e-4)
    assert ops.parse("b1_4_h1_d8_k3_causal").work("forward", 4)[0] == pytest.approx(4 * 8 * (1 + 2 + 3 + 3) / 1e9)


def test_default_groups():
    """Each can be planned, and compares what its name says."""
    setting = SETTING._replace(threads=2)
    for module in (ops, layers, models):
        for group in module.GROUPS:
            entries = module.plan(group, None, setting)
            assert len(entries) == len(set(entries)) >= 2
            assert {entry.group for entry in entries} == {group}
    varied = {
        "dtype": lambda entry: entry.setting.dtype,
        "rpb": lambda entry: ops.parse(entry.case).has_rpb,
        "threads": lambda entry: entry.setting.threads,
        "tokens": lambda entry: ops.parse(entry.case).space,
        "call": lambda entry: ops.parse(entry.case).heads,
    }
    found = {
        group: [vary(entry) for entry in ops.plan(group, None, setting) if entry.pass_name == "forward"]
        for group, vary in varied.items()
    }
    assert found == {
        "dtype": ["float32", "bfloat16"],
        "rpb": [False, True],
        "threads": [2, 1],
        "tokens": [(56, 56), (112, 112)],
        "call": [1, 16],
    }


# ----- timing ---------------------------------------------------------------------------------------------------------


DEVICE = torch.device("cpu")


@pytest.fixture
def make_contestant(monkeypatch):
    """Makes contestants whose calls take as long as they say by a clock of their own, and note their name."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def make(milliseconds: float, name: str = "", calls: list | None = None, needs_grad: bool = False):
        def call() -> None:
            now[0] += milliseconds / 1e3
            if calls is not None:
                calls.append((name, torch.is_grad_enabled()))

        return timing.Contestant(Subject(call, 0.0, 0.0, needs_grad), torch.get_num_threads(), DEVICE)

    return make


def test_contestants_run_in_turns(make_contestant):
    calls = []
    contestants = [make_contestant(ms, name, calls) for name, ms in (("a", 20), ("b", 21), ("slow", 90))]
    timing.interleave(contestants, rounds=9, patience_s=0.03, title="")
    assert [len(contestant.samples_ms) for contestant in contestants] == [9, 9, 3]
    order = " ".join(name for name, _ in calls[3:])  # after the warm-up
    assert order == "a b slow b a a b a b slow b a a b a b slow b a a b"
    assert contestants[2].percentiles() == pytest.approx((90, 90, 90))


def test_short_calls_fill_a_sample(make_contestant):
    contestant = make_contestant(3)
    assert contestant.warm_up() == pytest.approx(3)
    assert contestant.number == 8
    contestant.sample()
    assert contestant.samples_ms == pytest.approx([3])


def test_autograd_is_on_only_where_asked_for(make_contestant):
    calls = []
    for needs_grad in (False, True):
        make_contestant(20, needs_grad=needs_grad, calls=calls).sample()
    assert calls == [("", False), ("", True)]


def test_threads_change_between_samples(make_contestant):
    before, calls = torch.get_num_threads(), []
    contestant = make_contestant(20, calls=calls)
    try:
        torch.set_num_threads(before + 1)
        contestant.sample()
        assert torch.get_num_threads() == before
        assert len(calls) == 2  # one for the new threads, not timed
        contestant.sample()
        assert len(calls) == 3
    finally:
        torch.set_num_threads(before)
