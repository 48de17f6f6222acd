"""benchmarks/gpu: the session's arithmetic, table and bars; a part that fails or does not end is named."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from benchmarks.gpu import bars, compiled, parity, quality, session, speed
from benchmarks.gpu.report import HEADER, Report, add_line, table_line
from benchmarks.gpu.task import ROOT, Task
from benchmarks.gpu.trace import kind_of, summary
from benchmarks.measuring import Meter
from data_shards.schema import Manifest

SCRIPTS = [ROOT / "benchmarks" / name for name in ("gpu_session.sh", "gpu_wheels.sh")]


def test_parts_fit_into_nine_minutes() -> None:
    assert sum(part.seconds for part in session.PARTS) + session.END_S <= session.WHOLE_S


@pytest.mark.parametrize("minutes", [1.5, 9.0, 20.0])
def test_a_session_of_slow_parts_ends_in_time(minutes: float) -> None:
    left_s = minutes * 60
    for part in session.PARTS:
        limit_s = session.limit_of(part, minutes, left_s, part is session.PARTS[-1])
        assert limit_s <= left_s - session.END_S or limit_s == 0
        left_s -= limit_s
    assert left_s >= session.END_S


def test_time_that_parts_leave_goes_to_the_last() -> None:
    part = session.PARTS[0]
    assert session.limit_of(part, 9, 500, is_last=False) == part.seconds
    assert session.limit_of(part, 9, 500, is_last=True) == 500 - session.END_S
    assert session.limit_of(part, 9, session.END_S + session.LEAST_S - 1, is_last=False) == 0


@pytest.mark.parametrize(
    ("name", "card", "value"),
    [
        ("training", "NVIDIA H200", 4000),
        ("training", "NVIDIA H100 80GB HBM3", 3600),
        ("scoring", "NVIDIA H100 80GB HBM3", 14_000),
    ],
)
def test_the_bar_is_the_cards(name: str, card: str, value: float) -> None:
    bar = bars.bar_of(name, card)
    assert bar is not None
    assert bar.value == value and bar.is_met(value) and not bar.is_met(value - 1)


def test_an_epoch_must_be_short_and_other_cards_have_no_bar() -> None:
    bar = bars.bar_of("LightGCN epoch", "NVIDIA H200")
    assert bar is not None
    assert bar.is_met(59) and not bar.is_met(61)
    assert bars.bar_of("training", "cpu") is None and bars.bar_of("no such", "NVIDIA H200") is None


def test_every_number_is_on_disk_at_once(tmp_path: Path) -> None:
    report = Report("speed", tmp_path, "NVIDIA H200")
    report.add("training, paper prompt", 3999, "examples/s", "training")
    table = (tmp_path / "table.md").read_text()
    assert table == HEADER + "| speed | training, paper prompt | 3,999 examples/s | ≥ 4,000 | not met |\n"
    assert (
        json.loads((tmp_path / "speed.json").read_text())["values"]["training, paper prompt"]["met"] is False
    )
    report.note("more", "skipped: no | time\nleft")
    assert (tmp_path / "table.md").read_text().endswith("| speed | more | skipped: no / time left |  |  |\n")
    add_line(tmp_path, table_line("session", "all parts", "1 s"))
    assert (tmp_path / "table.md").read_text().count("| part |") == 1


@pytest.mark.parametrize(
    ("body", "problem"),
    [("import sys; sys.exit(3)", "exit code 3"), ("import time; time.sleep(60)", "did not end")],
)
def test_a_part_that_fails_or_hangs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, problem: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setattr(session.sys, "executable", str(program))
    assert problem in session.supervise(Task("speed", tmp_path, 1.0), 1.0)


LEAVES_A_CHILD = """import subprocess, sys
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
sys.exit(3)"""


def test_a_part_that_fails_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service or a training that it started would hold the GPU's memory while the next parts measure."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{LEAVES_A_CHILD}\n")
    program.chmod(0o755)
    monkeypatch.setattr(session.sys, "executable", str(program))
    assert session.supervise(Task("service", tmp_path, 30.0), 30.0) == "failed with exit code 3"
    child = int((tmp_path / "service.log").read_text())
    psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=5)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_parts_imports_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for the time left would otherwise begin a measurement that is killed."""
    seen = []
    monkeypatch.setattr(
        importlib, "import_module", lambda name: SimpleNamespace(run=lambda t, r: seen.append(t))
    )
    assert session.run_part(Task("speed", tmp_path, 75.0).to_json(), time.monotonic() - 9) == 0
    assert 64 < seen[0].seconds < 66


def test_tasks_travel_as_json(tmp_path: Path) -> None:
    for task in (Task("trace", tmp_path, 3.0), Task("quality", tmp_path, 3.0, True, tmp_path / "data")):
        assert Task.from_json(task.to_json()) == task


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("void at::native::reduce_kernel<512>", "reductions and norms"),
        ("void at::native::vectorized_elementwise_kernel<4>", "the rest"),
    ],
)
def test_kernels_are_sorted(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_a_kernel_counts_once() -> None:
    """Of a GPU torch lists marked regions, too: `Optimizer.step` holds the optimiser's kernels. The wait for
    a step's end is the measurement's."""

    def event(name: str, device: str, microseconds: int, is_region: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=lambda: name,
            device_type=lambda: f"DeviceType.{device}",
            duration_ns=lambda: 1000 * microseconds,
            is_user_annotation=lambda: is_region,
        )

    events = [
        event("nvjet_hsh_128x256", "CUDA", 300_000),
        event("nvjet_hsh_128x256", "CUDA", 300_000),
        event("multi_tensor_apply_kernel", "CUDA", 200_000),
        event("Optimizer.step#AdamW.step", "CUDA", 250_000, is_region=True),
        event("cudaLaunchKernelExC", "CPU", 5),
        event("cudaLaunchKernel", "CPU", 5),
        event("cudaStreamSynchronize", "CPU", 7000),
        event("cudaDeviceSynchronize", "CPU", 90_000),
    ]
    found = summary(events, wall_s=1.0, on_gpu=True)
    assert found["shares"] == pytest.approx({"matrix products": 0.75, "optimiser": 0.25})
    assert found["idle"] == pytest.approx(0.2) and found["launches"] == 2
    assert found["waits"] == 1 and found["waiting_s"] == pytest.approx(0.007)


def test_the_sweep_ends_before_the_parts_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s, requests = [0.0], []

    def measure(request: dict[str, Any], program: Any = None) -> dict[str, Any]:
        clock_s[0] += 13
        requests.append(request)
        return {"per_s": 1.0, "peak_memory_bytes": 1, "mfu": None}

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: clock_s[0]))
    monkeypatch.setattr(Task, "text_folder", lambda self: tmp_path)
    speed.run(Task("speed", tmp_path, 6 * 13 + 2 * 13 + 10), Report("speed", tmp_path, "cpu"))
    assert len(requests) == 6 + 2
    assert all(request["weights_on_device"] for request in requests)
    assert sum(request["mfu"] for request in requests) == 4


def test_compiling_is_reported_before_the_other_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is killed later has this."""

    class Steps:
        def __init__(self, request: dict[str, Any]) -> None:
            self.device = "cpu"

        def __call__(self, meter: Meter) -> None:
            with meter.step():
                if meter.num_steps:
                    raise TimeoutError

    monkeypatch.setattr(compiled.gensr_steps, "Steps", Steps)
    with pytest.raises(TimeoutError):
        compiled.measure(Report("compiled", tmp_path, "cpu"), "training", {"warmup": 1, "steps": 1})
    assert "training: the first step" in json.loads((tmp_path / "compiled.json").read_text())["values"]


def test_tests_that_have_ended_are_counted() -> None:
    log = "tests/gpu/a.py::test_one[x-y z] PASSED [ 1%]\ntests/gpu/a.py::test_two FAILED [ 2%]\n"
    found = parity.outcomes(f"FAILED is no outcome here\n{log}tests/gpu/a.py::test_three[PASSED]")
    assert found == {"passed": 1, "failed": 1, "error": 0, "skipped": 0}


def test_a_part_that_is_ended_while_it_makes_the_data_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gensr prepare` refuses a folder that is there."""

    def made(folder: Path, threads: int, progress: Any) -> None:
        (folder / "prepared").mkdir()

    monkeypatch.setattr("benchmarks.gpu.task.synthetic_folder", made)
    (tmp_path / "work" / "text" / "prepared").mkdir(parents=True)
    assert Task("graph", tmp_path, 20.0).text_folder().is_dir()


def test_results_are_kept_after_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, keep = tmp_path / "out", tmp_path / "keep"
    (out / "work").mkdir(parents=True)
    (out / "work" / "large").write_text("checkpoint")
    seen = []

    def supervise(task: Task, limit_s: float) -> str:
        seen.append((keep / "table.md").read_text() if keep.exists() else "")
        add_line(out, table_line(task.part, "a number", "1"))
        return ""

    monkeypatch.setattr(session, "supervise", supervise)
    assert session.session(out, 9.0, True, None, ["speed", "trace"], keep=keep) == 0
    assert [text.count("a number") for text in seen] == [0, 1, 2]
    assert (keep / "table.md").read_text() == (out / "table.md").read_text()
    with tarfile.open(keep / "results.tar.gz") as archive:
        assert [name for name in archive.getnames() if name != "."] == ["./table.md"]
    keep_in_a_file = tmp_path / "out" / "table.md"
    session.keep_results(out, keep_in_a_file)  # what cannot be kept does not end a session


def test_a_copied_tree_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENSR_COMMIT", "0123abc")
    session.check(Report("check", tmp_path, "cpu"))
    assert json.loads((tmp_path / "check.json").read_text())["machine"]["commit"] == "0123abc"


@pytest.mark.parametrize("part", session.PARTS, ids=lambda part: part.name)
def test_every_part_can_be_run(part: session.Part) -> None:
    assert callable(importlib.import_module(f"benchmarks.gpu.{part.module}").run)


def test_what_the_script_has_spent_is_of_the_minutes(tmp_path: Path) -> None:
    bad = session.session(tmp_path, 1.0, True, None, [], spent_s=50.0)
    assert bad == 1 + len(session.PARTS)
    assert "skipped: 10 s are left" in (tmp_path / "table.md").read_text()


class Counts:
    """Of Scientific's prepared folder, as far as quality.affordable_steps() asks."""

    num_negatives = 99

    def num_events(self, split: str) -> int:
        return {"train": 82_615, "test": 16_634}[split]


def test_quality_keeps_time_for_its_evaluation(tmp_path: Path) -> None:
    report = Report("speed", tmp_path, "cpu")
    report.add("training, compact prompt", 10_000)
    report.add("scoring, compact prompt", 40_000)  # 1.66 million candidates: 42 s
    task, counts = Task("quality", tmp_path, 200.0), cast(Manifest, Counts())
    steps = quality.affordable_steps(task, counts, 8, 200.0)
    training_s = steps * quality.BATCH * 8 / 10_000
    assert 60 < training_s < 200 - 42
    assert quality.affordable_steps(task, counts, 8, 50.0) == 0
    assert quality.affordable_steps(task, counts, 8, 85.0) == 10
    assert quality.affordable_steps(task, counts, 8, 1e6) == quality.MAX_EPOCHS * (82_615 // quality.BATCH)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        check = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
        assert check.returncode == 0, check.stdout
    if script.name == "gpu_session.sh":
        assert subprocess.run([str(script)], capture_output=True, check=False).returncode == 2


def test_a_session_begins_whatever_pip_says(tmp_path: Path) -> None:
    """The wheels are unpacked instead: one that does not fit this machine costs what imports it, not the
    session."""
    wheels, python = tmp_path / "wheels", tmp_path / "python"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "no_such_package-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("no_such_package.py", "")
    answers = 'case "$2" in pip) exit 1;; benchmarks.gpu.session) exit 0;; esac'
    python.write_text(f'#!/bin/sh\n{answers}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "GENSR_WHEELS": str(wheels)}
    subprocess.run([str(SCRIPTS[0]), str(tmp_path / "out")], env=environment, check=True)
    assert (tmp_path / "out" / "work" / "site" / "no_such_package.py").is_file()
