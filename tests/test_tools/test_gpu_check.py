"""tools/gpu_check.sh: its limits and its table with parts that fail, and a rehearsal of the real parts on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_checks import counters, rows, speed
from gpu_checks.__main__ import run_all
from gpu_checks.parts import PARTS, Part
from gpu_checks.rows import Row, Writer

from natten.profiler import find_gpu

ROOT = Path(__file__).parents[2]
_WRITE = (
    "import sys; from pathlib import Path; from gpu_checks.rows import Writer; w = Writer(Path(sys.argv[1]), 'part');"
)


def part(name: str, limit_s: float = 20, is_required: bool = False) -> Part:
    return Part(name, "", limit_s, 0.1, is_required)


def run(folder: Path, codes: dict[str, str], seconds: float = 60, limit_s: float = 20, required: str = "") -> dict:
    """Run parts with this code, and return the verdicts of their rows."""
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tools")))
    parts = [part(name, limit_s, name == required) for name in codes]

    def command(given: Part) -> list[str]:
        code = _WRITE.replace("'part'", repr(given.name)) + codes[given.name]
        return [sys.executable, "-c", code, str(folder)]

    status = run_all(parts, folder, seconds, command)
    found = rows.read(folder)
    assert (folder / "table.md").read_text().count("\n") == len(found) + 2
    return {"status": status} | {name: [row.verdict for row in found if row.part == name] for name in codes}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")


def test_a_crash_ends_only_its_part(tmp_path: Path):
    codes = {
        "good": "w.checked('a', True, 'fine'); w.judged('b', 1.5, 2.0)",
        "crash": "w.measured('c', '1 us'); import os; os.abort()",
        "mute": "pass",
        "wrong": "w.judged('d', 3.0, 2.0); w.judged('e', float('nan'), 2.0); w.judged('f', 3.0, 2.0, is_least=True)",
    }
    assert run(tmp_path, codes) == {
        "status": 1,
        "good": ["passed", "passed"],
        "crash": ["measured", "failed"],
        "mute": ["open"],
        "wrong": ["failed", "failed", "passed"],
    }


def test_a_part_that_takes_too_long_keeps_its_rows(tmp_path: Path):
    code = (
        "w.measured('a', '1 us'); import subprocess, time;"
        "child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); time.sleep(600)"
    )
    started = time.monotonic()
    found = run(tmp_path, {"slow": code, "next": "w.checked('b', True, '')"}, limit_s=5)
    assert found == {"status": 0, "slow": ["measured", "open"], "next": ["passed"]}
    assert time.monotonic() - started < 30
    child = int((tmp_path / "slow.log").read_text().splitlines()[-1])
    with pytest.raises(ProcessLookupError):  # what a part has started ends with it
        for _ in range(100):
            os.kill(child, 0)
            time.sleep(0.05)


def test_the_time_of_the_run_is_limited(tmp_path: Path):
    codes = {"first": "w.checked('a', True, '')", "second": "pass"}
    assert run(tmp_path, codes, seconds=8.05) == {"status": 0, "first": ["open"], "second": ["open"]}


@pytest.mark.parametrize("code", ["w.checked('a', False, 'wrong')", "pass", "raise SystemExit(3)"])
def test_a_failed_smoke_test_ends_the_run(tmp_path: Path, code: str):
    found = run(tmp_path, {"smoke": code, "next": "w.checked('b', True, '')"}, required="smoke")
    assert found["next"] == ["open"]


def test_an_interrupted_run_ends_with_its_table(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from gpu_checks.__main__ import run_all;"
        "from gpu_checks.parts import Part; sleep = [sys.executable, '-c', 'import time; time.sleep(600)'];"
        "sys.exit(run_all([Part('a', '', 60, 1), Part('b', '', 60, 1)], Path(sys.argv[1]), 100, lambda part: sleep))"
    )
    path = os.pathsep.join((str(ROOT), str(ROOT / "tools")))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline().startswith(b"== a")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read().decode()
    assert process.returncode == 0
    assert output.count("| open |") == 2


def test_an_incomplete_line_is_ignored(tmp_path: Path):
    Writer(tmp_path, "part").measured("a", "1 us")
    with (tmp_path / rows.ROWS_FILE).open("a") as file:
        file.write('["part", "b"')
    assert rows.read(tmp_path) == [Row("part", "a", "1 us")]


def test_bars_of_the_operator(tmp_path: Path):
    row = {"kind": "ops", "group": "bias and dtype", "provider": "natten-cuda", "dtype": "bfloat16"}
    row |= {"images_per_s": None, "peak_memory_mb": None, "percent_of_floor": 50.0}
    writer, rows_of_group = Writer(tmp_path, "ops"), []
    for name, ms in (("x_norpb", 1.0), ("x", 1.2)):
        rows_of_group.append(row | {"pass": "forward", "case": name, "p50_ms": ms})
    speed._judge(writer, rows_of_group, {})
    verdicts = {found.what: found.verdict for found in rows.read(tmp_path)}
    assert verdicts["x, forward, bias on/off"] == "failed"
    assert sum(verdict == "passed" for verdict in verdicts.values()) == 2


def test_bars_against_others(tmp_path: Path):
    row = {"kind": "layers", "case": "x", "pass": "forward", "group": "x", "images_per_s": None}
    ours = row | {"provider": "natten-cuda", "p50_ms": 1.0, "peak_memory_mb": 70.0}
    rival = row | {"provider": "timm-window", "p50_ms": 2.5, "peak_memory_mb": 100.0}
    speed._judge(Writer(tmp_path, "layers"), [ours, rival], {})
    assert [found.verdict for found in rows.read(tmp_path)] == ["passed", "failed"]


def test_counters_are_read_from_csv():
    output = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","natten_attention_tiles","gpu__time_duration.sum","ns","85,312"\n'
        '"0","natten_attention_tiles","other","","1"\n'
    )
    assert list(counters.parse(output)) == [("attention_tiles", "time", "85,312 ns")]
    assert list(counters.parse("no permission")) == []


def test_kernels_compiled_ahead_include_those_of_a_model():
    from gpu_checks import compiling
    from gpu_checks.random_problems import kernels

    gpu = find_gpu("9.0")
    found = compiling.all_kernels(gpu)
    assert kernels(gpu) <= found
    names = {kernel.name for kernel in found}
    assert names >= {f"natten_{name}" for name in ("attention", "logits_tiles", "gather_tiles", "scatter_tiles")}
    assert {dict(text.split("=") for text in kernel.definitions).get("ELEMENT") for kernel in found} >= {
        "0",
        "1",
        "2",
        "3",
    }


@pytest.mark.slow
def test_rehearsal(tmp_path: Path):
    """All parts on the CPU, from the command line."""
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    found = rows.read(tmp_path)
    assert {row.part for row in found} == {given.name for given in PARTS}
    by_speed = {given.name for given in PARTS if given.module == "speed"}  # on a CPU the bars mean nothing
    assert not [row for row in found if row.verdict == "failed" and row.part not in by_speed]
    assert not [row for row in found if "ended with status" in row.found]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
