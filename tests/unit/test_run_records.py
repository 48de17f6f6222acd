"""Records of a run as files that may be damaged: what reads a status shows a run that says nothing, and of
other records what is sound, not a traceback."""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.torture.damage import damage_document, written
from trainer.analysis.report.sections import provenance
from trainer.experiments.import_runs import _points
from trainer.experiments.sweep import _row, lines_of
from trainer.runs.checkpoint import Progress
from trainer.runs.run_folder import RunFolder
from trainer.runs.status import begin_status, read_progress

METRICS = {"rec/ndcg@10": 0.25, "mean/ndcg@10": 0.25}


def whole() -> dict[str, Any]:
    progress = Progress(step=1200, events_seen=9600, best_step=800, best_value=0.25, best_metrics=METRICS)
    return {"status": "stopped", "progress": asdict(progress)}


def used(run: Path) -> None:
    """Everything that reads a status."""
    RunFolder(run).standing()
    read_progress(run)
    provenance(RunFolder(run))
    lines_of({"runs": [_row(run, None)], "comparison": {}})


@pytest.mark.parametrize(
    "content",
    [
        '{"status": "finished", "progress": []}',
        '{"status": "finished", "progress": null}',
        '{"status": [], "progress": {}}',
        '{"status": "done", "progress": {}}',
        '{"status": "stopped", "progress": {"step": "a"}}',
        '{"status": "stopped", "progress": {"best_step": NaN}}',
        '{"status": "stopped", "progress": {"best_metrics": {"a": "b"}}}',
        '{"status": "stopped", "progress": {"train_s": 1' + "0" * 400 + "}}",
        "[1]",
        '{"status": "stop',
    ],
)
def test_a_damaged_status_says_nothing(tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text(content)
    assert RunFolder(run).read_status() == {}
    assert not RunFolder(run).has_ended_well
    assert read_progress(run) == Progress() and RunFolder(run).standing() == ""
    used(run)


def test_hundreds_of_damaged_statuses_give_no_traceback(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for number in range(300):
        done, document = damage_document(whole(), random.Random(f"status/{number}"))
        (run / "status.json").write_text(written(document), encoding="utf-8", errors="surrogatepass")
        try:
            used(run)
        except Exception as error:
            raise AssertionError(f"{number}: {done}") from error


def test_parts_of_an_environment_that_are_damaged_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"git": "x", "hardware": [1], "packages": 3, "user": "ada"}')
    assert RunFolder(tmp_path).read_environment() == {"user": "ada"}
    provenance(RunFolder(tmp_path))


def test_records_that_are_damaged_are_not_imported() -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": 1, "loss": 0.5, "train_s": [2.0]},
        {"kind": "train", "step": 2, "loss": 10**400, "lr": 0.1, "train_s": 3.0},
        {"kind": "train", "step": "three", "loss": 0.5},
        {"step": 4, "loss": 0.5},
    ]
    points = [record["metric"] for record in _points(lines, 1000)]
    assert points == [
        ["train/loss", 0.5, 1000, 1],
        ["train/lr", 0.1, 4000, 2],
        ["train/train_s", 3.0, 4000, 2],
    ]


def test_a_whole_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    progress = Progress(**whole()["progress"])
    begin_status(tmp_path, progress)
    assert read_progress(tmp_path) == progress
    assert RunFolder(tmp_path).standing() == "its run is running, or was killed, at step 1,200"
    newer = {"status": "stopped", "progress": {**asdict(progress), "of_a_newer_gensr": 1}}
    (tmp_path / "status.json").write_text(json.dumps(newer))
    assert read_progress(tmp_path) == progress
