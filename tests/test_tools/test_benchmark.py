"""tools/benchmark.py: what it writes, that it compares equal problems, and what it refuses."""

import csv
import subprocess
import sys
from functools import partial
from pathlib import Path

import benchmark
import pytest
import torch
from benchmarks import gpu, layers, models, ops, timm_tables
from benchmarks.entry import Entry, LeftOut, Setting
from benchmarks.memory import peak_mb_in_new_process
from benchmarks.report import COLUMNS

from natten import profiler
from natten.backends.cpu.build import cpu_library
from natten.profiler import Timer, schedule
from natzoo import command_line

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "benchmark.py"
SETTING = Setting("float32", torch.get_num_threads(), "cpu")
TINY = "b1_8x8_h2_d8_k3"
CASES = (TINY, "b2_13_h1_d8_k3_dil3", "b1_6x7x8_h2_d8_k2x3x2", "b1_9x8_h2_d8_k3_causal", "b1_9x8_h2_d8_k4x2_norpb")
OTHER_CASES = (  # that only natten supports
    "b1_9x8_h4_kv2_d8_v12_k3",
    "b1_9x8_h3_kv1_d10_k3_norpb",
    "b2_9x8_h2_d8_k3_qk",
    "b1_11_h2_d8_k3_causal_norpb_qk",
    "b1_6x7x8_h2_d8_k2x3x2_av",
)
PASSES = ("forward", "forward+backward")


def run(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command in a process of its own."""
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_figures(row: dict[str, str]) -> None:
    """Percentiles are ordered, and percentages follow from the other columns."""
    names = ("p20_ms", "p50_ms", "p80_ms", "gflop", "gemm_gflops", "small_gemm_gflops", "copy_gb_s")
    value = {name: float(row[name]) for name in names}
    assert 0 < value["p20_ms"] <= value["p50_ms"] <= value["p80_ms"]
    assert min(value["gemm_gflops"], value["small_gemm_gflops"], value["copy_gb_s"]) > 0
    expected = 100 * value["gflop"] / (value["p50_ms"] / 1e3) / value["gemm_gflops"]
    assert float(row["percent_of_gemm"]) == pytest.approx(expected, rel=1e-3)
    assert float(row["percent_of_floor"]) >= float(row["percent_of_gemm"])


def entry_of(provider: str, case: str = TINY, pass_name: str = "forward+backward", dtype: str = "float32") -> Entry:
    return Entry("ops", case, case, provider, pass_name, SETTING._replace(dtype=dtype))


def check(entry: Entry) -> None:
    subject = ops.make(entry)
    subject.check(subject.run(entry))


# ----- the commands ---------------------------------------------------------------------------------------------------


def test_ops(tmp_path):
    out = tmp_path / "new" / "ops.csv"
    providers = ["natten-cpu", "natten-reference", "sdpa", "gather"]
    cpu_library()  # compiled here, because the first compilation is announced on stderr
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
    assert all(provider in done.stdout for provider in providers)


def test_published_tables_have_the_same_columns():
    for kind in benchmark.KINDS:
        with (ROOT / "assets" / "benchmarks" / f"{kind}.csv").open(newline="") as file:
            assert tuple(next(csv.reader(file))) == COLUMNS


@pytest.fixture
def quick(monkeypatch):
    """Measure the limits of the machine on small matrices, and make up the peak memory, which takes a process."""
    monkeypatch.setitem(profiler.MATRIX_SIDE, "cpu", 128)
    monkeypatch.setitem(profiler.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr(profiler, "WARM_UP_S", 0.0)
    monkeypatch.setattr(benchmark, "peak_mb_in_new_process", lambda entry, script: 1.5)


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


def test_tables_of_timm(tmp_path, quick):
    """They have timm's names and columns, a table per pass, and the fastest row first."""
    words = ["--repeats", "2", "--no-memory", "--out", str(tmp_path / "models.csv"), "--timm-tables", str(tmp_path)]
    cases = ["inference_b1_32", "inference_b2_64", "step_b2_32"]
    benchmark.main(["models", "--case", *cases, "--provider", "nat_mini", "test_byobnet", *words])
    (infer,), (train,) = (
        list(tmp_path.glob(f"benchmark-{name}-fp32-nchw-pt*-cpu-*.csv")) for name in ("infer", "train")
    )
    rows = read(infer)
    assert tuple(rows[0]) == timm_tables.INFER_COLUMNS and len(rows) == 4
    speeds = [float(row["infer_samples_per_sec"]) for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    nat = next(row for row in rows if row["model"] == "nat_mini" and row["infer_img_size"] == "64")
    assert (nat["infer_batch_size"], nat["param_count"]) == ("2", "19.98") and 0 < float(nat["infer_gmacs"]) < 1
    seconds = float(nat["infer_step_time"]) / 1e3
    assert float(nat["infer_samples_per_sec"]) == pytest.approx(2 / seconds, rel=1e-2)
    assert tuple(read(train)[0]) == timm_tables.TRAIN_COLUMNS
    table, parts = str(tmp_path / "models.csv"), tmp_path / "parts"
    benchmark.main(["timm-tables", table, "--case", *cases[1:], "--out", str(parts)])
    assert [row["model"] for row in read(parts / train.name)] == [row["model"] for row in read(train)]
    names = [row["model"] for row in rows if row["infer_img_size"] == "64"]
    assert [row["model"] for row in read(parts / infer.name)] == names
    with pytest.raises(ValueError, match="no rows of models for inference_b9_32"):
        benchmark.main(["timm-tables", table, "--case", "inference_b9_32"])
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        benchmark.main(["timm-tables", "none.csv"])


def test_tables_of_timm_of_all_parts(tmp_path, quick):
    """A table measured in parts becomes one table."""
    words = ["--provider", "test_byobnet", "--repeats", "2", "--no-memory", "--append"]
    for case in ("inference_b1_32", "inference_b2_32"):
        out = ["--out", str(tmp_path / "models.csv"), "--timm-tables", str(tmp_path)]
        benchmark.main(["models", "--case", case, *words, *out])
    (infer,) = tmp_path.glob("benchmark-infer-*.csv")
    assert {row["infer_batch_size"] for row in read(infer)} == {"1", "2"}


def test_append(tmp_path, quick):
    """Rows of other cases are kept, and the same case is replaced."""
    out = tmp_path / "models.csv"
    words = ["--provider", "test_byobnet", "--repeats", "2", "--no-memory", "--out", str(out)]
    benchmark.main(["models", "--case", "inference_b1_32", "inference_b2_32", *words])
    benchmark.main(["models", "--case", "inference_b2_32", "inference_b3_32", *words, "--append"])
    assert [row["case"] for row in read(out)] == ["inference_b1_32", "inference_b2_32", "inference_b3_32"]
    out.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"models\.csv is not a table"):
        benchmark.main(["models", "--case", "inference_b1_32", *words, "--append"])


def test_a_training_step_in_16_bits_uses_autocast():
    entry = Entry("models", "step_b1_32", "step_b1_32", "test_vit", "step", SETTING._replace(dtype="bfloat16"))
    assert models.make(entry).run(entry).dtype == torch.float32


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
    providers = ["natten-cpu", "natten-reference", "timm-window", "timm-shifted-window"]
    assert [row["provider"] for row in rows] == 2 * providers
    for row in rows:
        check_figures(row)
        assert row["peak_memory_mb"] == "1.5"
        work = 2 * 2 * 64 * 9 * 8 + 4 * 64 * 16 * 16  # multiplications of the operator, and of the projections
        if row["pass"] == "forward+backward":
            work = 7 * 2 * 64 * 9 * 8 + 3 * 4 * 64 * 16 * 16
        assert float(row["gflop"]) == pytest.approx(2 * work / 1e9, rel=1e-4)


def test_gpu_rehearsal(tmp_path, quick):
    """The measurements for a GPU run, with tiny shapes on the CPU."""
    out = tmp_path / "gpu.csv"
    with pytest.raises(SystemExit) as end:
        benchmark.main(["gpu", "--rehearse", "--repeats", "1", "--out", str(out)])
    assert end.value.code == 0
    rows = read(out)
    assert {row["kind"] for row in rows} == set(benchmark.KINDS)
    for row in rows:
        check_figures(row)
    with_bias, without = (
        {row["pass"] for row in rows if row["group"] == "bias and dtype" and row["case"].endswith("norpb") is is_off}
        for is_off in (False, True)
    )
    assert with_bias == without == set(PASSES)


def test_gpu_plan():
    """Each group compares natten with something, or with itself."""
    for part in gpu.PARTS:
        for entries in gpu.plan(part, "cuda:0", False):
            assert {entry.provider for entry in entries} & gpu.OURS
            assert len(entries) == len(set(entries)) >= 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_needs_a_gpu():
    with pytest.raises(ValueError, match="CUDA"):
        benchmark.main(["gpu"])


def test_memory_is_what_a_call_adds():
    case = "b8_56x56_h2_d32_k7"
    measured = peak_mb_in_new_process(Entry("layers", case, case, "natten-cpu", "forward", SETTING), str(SCRIPT))
    assert measured == pytest.approx(5 * 8 * 56 * 56 * 64 * 4 / 1e6, rel=0.2)  # qkv, attention's output, the layer's


def test_list(capsys):
    for kind, module in benchmark.KINDS.items():
        benchmark.main([kind, "--list"])
        shown = capsys.readouterr().out.split()
        assert {*module.GROUPS, *module.PROVIDERS} <= set(shown)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("ops --case b1_8x8_h4_kv3_d8_k3", "'b1_8x8_h4_kv3_d8_k3'"),
        ("ops --case b1_8x8_h4_kv2_d8_k3_av", "'b1_8x8_h4_kv2_d8_k3_av'"),
        ("layers --case b1_8x8_h4_kv2_d8_k3", "'b1_8x8_h4_kv2_d8_k3'"),
        ("ops --case wibble", "'wibble'"),
        ("ops --case b1_8x8_h2_d8_k9", "'b1_8x8_h2_d8_k9'"),
        ("ops --provider natten-cpu wibble", "'wibble'"),
        ("layers --case b1_8_h2_d8_k3", "'b1_8_h2_d8_k3'"),
        ("layers --provider gather", "'gather'"),
        ("models --case step_b0_224", "'step_b0_224'"),
        ("models --provider wibble", "'wibble'"),
        ("ops --device wibble", "'wibble'"),
        ("ops --dtype tf32", "--dtype tf32"),
        ("memory models step_b1_32 nat_mini inference", "'inference'"),
        (f"ops --case {TINY} --provider flex_attention --out .", "--out"),
        ("gpu wibble --rehearse", "'wibble'"),
    ],
)
def test_mistakes_end_in_one_line(arguments, named, capsys):
    with pytest.raises(SystemExit) as error:
        command_line.run(lambda: benchmark.main(arguments.split()))
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_nothing_left_to_time(tmp_path, capsys):
    out = tmp_path / "layers.csv"
    with pytest.raises(ValueError, match="--provider"):
        benchmark.main(["layers", "--case", f"{TINY}_norpb", "--provider", "timm-window", "--out", str(out)])
    assert not out.exists()
    lines = capsys.readouterr().err.splitlines()
    assert ["timm-window" in line for line in lines] == [True] * 2


# ----- what is compared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("provider", ["natten-cpu", "sdpa", "gather"])
def test_providers_agree_with_the_reference(provider, case):
    for pass_name in PASSES:
        for dtype in ("float32", "bfloat16"):
            check(entry_of(provider, case, pass_name, dtype))


@pytest.mark.parametrize("case", OTHER_CASES)
def test_what_only_natten_supports(case):
    for pass_name in PASSES:
        for dtype in ("float32", "bfloat16"):
            check(entry_of("natten-cpu", case, pass_name, dtype))
    for provider in ("sdpa", "gather", "flex_attention"):
        with pytest.raises(LeftOut):
            ops.make(entry_of(provider, case, "forward"))


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("case", CASES)
def test_flex_attention_agrees_with_the_reference(case):
    check(entry_of("flex_attention", case, "forward"))
    with pytest.raises(LeftOut):
        ops.make(entry_of("flex_attention", case))


@pytest.mark.parametrize("wrong", range(3))
def test_a_wrong_result_is_refused(wrong):
    entry = entry_of("natten-reference")
    subject = ops.make(entry)
    result = [x.detach().clone() for x in subject.run(entry)]
    subject.check(tuple(result))
    result[wrong].view(-1)[5] += 0.01
    with pytest.raises(LeftOut):
        subject.check(tuple(result))
    result[wrong].view(-1)[5] = float("nan")
    with pytest.raises(LeftOut):
        subject.check(tuple(result))


def test_too_large_cases_are_left_out():
    for provider in ("sdpa", "flex_attention"):
        with pytest.raises(LeftOut, match="GiB"):
            ops.make(entry_of(provider, "b1_200x304_h2_d32_k7", "forward"))


def test_minimal_work():
    main = ops.parse("b8_56x56_h2_d32_k7")
    tensor_gb, table_gb = 8 * 56 * 56 * 2 * 32 * 4 / 1e9, 2 * 13 * 13 * 4 / 1e9
    work = {name: main.work(name, torch.float32) for name in PASSES}
    assert work["forward"] == pytest.approx((0.3147, 4 * tensor_gb + table_gb), rel=1e-4)
    assert work["forward+backward"] == pytest.approx((0.3147 * 3.5, 12 * tensor_gb + 3 * table_gb), rel=1e-4)
    causal = ops.parse("b1_4_h1_d8_k3_causal").work("forward", torch.float32)
    assert causal.gflop == pytest.approx(4 * 8 * (1 + 2 + 3 + 3) / 1e9)


def test_minimal_work_of_other_shapes_and_of_unfused_operators():
    grouped = ops.parse("b1_9_h4_kv2_d8_v16_k3_norpb")
    pairs, tokens = 4 * 9 * 3, 9
    work = {name: grouped.work(name, torch.float32) for name in PASSES}
    maps = tokens * (4 * 8 + 2 * 8 + 2 * 16 + 4 * 16)  # query, key, value, output
    assert work["forward"] == pytest.approx((2 * pairs * (8 + 16) / 1e9, 4 * maps / 1e9))
    assert work["forward+backward"] == pytest.approx((2 * pairs * (4 * 8 + 3 * 16) / 1e9, 12 * maps / 1e9))
    maps = tokens * 4 * (2 * 8 + 3)  # query and key, or value and output; logits or weights
    for part in ("qk", "av"):
        unfused = ops.parse(f"b1_9_h4_d8_k3_norpb_{part}")
        work = {name: unfused.work(name, torch.float32) for name in PASSES}
        assert work["forward"] == pytest.approx((2 * pairs * 8 / 1e9, 4 * maps / 1e9))
        gbytes = work["forward+backward"].gbytes - work["forward"].gbytes
        read_again, written = tokens * 4 * (2 * 8 + 3), tokens * 4 * (2 * 8 if part == "qk" else 8 + 3)
        assert gbytes == pytest.approx(4 * (read_again + written) / 1e9)
        assert work["forward+backward"].gflop == pytest.approx(3 * work["forward"].gflop)


def test_default_groups():
    """Each group can be planned and compares what its name says."""
    setting = SETTING._replace(threads=2)
    for module in (ops, layers, models):
        for group in module.GROUPS:
            entries = module.plan(group, None, setting)
            assert len(entries) == len(set(entries)) >= 2
            assert {entry.group.split()[0] for entry in entries} == {group}
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


def test_comparisons_of_several_lists():
    """Each list is a group of its own, whose first row is the baseline; all are timed together."""

    def lists_of(group: str) -> dict[str, list[str]]:
        lists: dict[str, list[str]] = {}
        for entry in ops.plan(group, None, SETTING):
            if entry.pass_name == "forward":
                lists.setdefault(entry.group, []).append(entry.case)
        return lists

    for name, (baseline, case) in lists_of("head_dim").items():
        dim = ops.parse(case).head_dim
        assert name == f"head_dim {dim}"
        assert dim < ops.parse(baseline).head_dim < dim + 8
    grouped = [[ops.parse(case) for case in cases] for cases in lists_of("gqa").values()]
    assert [(case.heads, case.kv_heads) for case in grouped[0]] == [(8, 8), (8, 2)]
    assert [(case.head_dim, case.value_dim) for case in grouped[1]] == [(48, 48), (32, 64)]
    for pair in grouped:
        assert len({case.work("forward", torch.float32).gflop for case in pair}) == 1
    for cases in lists_of("qk_av").values():
        assert [ops.parse(case).part for case in cases] == ["", "qk", "av"]


def test_comparisons_leave_out_other_providers():
    for providers, expected in ((["sdpa", "natten-cpu"], {"natten-cpu"}), (["sdpa"], {"sdpa"})):
        assert {entry.provider for entry in ops.plan("dtype", providers, SETTING)} == expected


@pytest.mark.parametrize("module", [ops, layers])
def test_the_compiled_backend_of_the_device_is_the_default(module):
    for device, provider in (("cpu", "natten-cpu"), ("cuda:0", "natten-cuda")):
        providers = [
            entry.provider for entry in module.plan("b8_7x7_h16_d32_k7", None, SETTING._replace(device=device))
        ]
        assert [name for name in providers if name in ("natten-cpu", "natten-cuda")] == [provider] * 2


# ----- timing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_timer(monkeypatch):
    """Return a function that makes timers whose calls advance a simulated clock and record their name."""
    now = [0.0]
    monkeypatch.setattr(profiler.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(profiler, "WARM_UP_S", 0.0)

    def make(milliseconds: float, name: str = "", calls: list | None = None, **options):
        def call() -> None:
            now[0] += milliseconds / 1e3
            if calls is not None:
                calls.append((name, torch.is_grad_enabled()))

        return Timer(call, torch.device("cpu"), **options)

    return make


def test_timers_take_turns(make_timer):
    calls = []
    timers = [make_timer(ms, name, calls) for name, ms in (("a", 20), ("b", 21), ("slow", 90))]
    turns = schedule(timers, rounds=9, patience_s=0.03)
    calls.clear()  # of the warm-up
    for timer in turns:
        timer.sample()
    assert [len(timer.samples_ms) for timer in timers] == [9, 9, 3]
    order = " ".join(name for name, _ in calls)
    assert order == "a b slow b a a b a b slow b a a b a b slow b a a b"
    assert [timers[2].percentile(percent) for percent in (20, 50, 80)] == pytest.approx([90, 90, 90])


def test_short_calls_fill_a_sample(make_timer):
    calls = []
    timer = make_timer(3, calls=calls)
    assert timer.warm_up() == pytest.approx(3)
    calls.clear()
    timer.sample()
    assert timer.samples_ms == pytest.approx([3])
    assert 3 * len(calls) >= profiler.SAMPLE_MS


def test_calls_on_other_inputs_take_turns(make_timer):
    calls = []
    timer = make_timer(10, "one", calls, others=[lambda: calls.append(("other", True))])
    timer.sample()
    assert [name for name, _ in calls] == ["one", "other"]
    assert timer.samples_ms == pytest.approx([5])


def test_calls_run_in_their_context(make_timer):
    calls = []
    for enabled in (False, True):
        make_timer(20, calls=calls, context=partial(torch.set_grad_enabled, enabled)).sample()
    assert calls == [("", False), ("", True)]


def test_threads_change_between_samples(make_timer):
    before, calls = torch.get_num_threads(), []
    timer = make_timer(20, calls=calls, threads=before)
    try:
        torch.set_num_threads(before + 1)
        timer.sample()
        assert torch.get_num_threads() == before
        assert len(calls) == 2  # the first starts the threads and is not timed
        timer.sample()
        assert len(calls) == 3
    finally:
        torch.set_num_threads(before)
