"""What a run says: the line, the clock, files with and without a resume, silence above rank 0."""

import json
from pathlib import Path

import pytest

from trainer.training.console import RunConsole, clock, keep_records, step_line

RECORD = {"loss": 0.43214, "lr": 8.1e-4, "events_per_s": 1234.4, "memory_gb": 1.2}


def test_the_line_has_step_share_loss_lr_speed_memory_and_time_left() -> None:
    assert (
        step_line(1200, 5000, RECORD, 751)
        == "step 1,200/5,000   24 %  loss 0.4321  lr 8.1e-04  1,234 ev/s  1.2 GB  eta 0:12:31"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3751, "1:02:31"), (360000, "100:00:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_files_and_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunConsole(tmp_path, 10) as console:
        console.banner([("data", "somewhere [96 events]"), ("precision", "fp32")])
        console.start_bar()
        console.step(2, RECORD)
        console.record({"kind": "valid", "step": 2, "mean/mrr": 0.5})
    log = (tmp_path / "train.log").read_text()
    assert "data       somewhere [96 events]" in log and "step 2/10" in log
    assert [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        "train",
        "valid",
    ]
    streams = capsys.readouterr()
    assert streams.out == "" and "somewhere [96 events]" in streams.err and "step 2/10" in streams.err


def test_a_resume_appends_and_drops_later_records(tmp_path: Path) -> None:
    for resume_step, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        with RunConsole(tmp_path, 10, resume_step=resume_step) as console:
            for step in steps:
                console.step(step, RECORD)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
    assert len((tmp_path / "train.log").read_text().splitlines()) == 5


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "st')
    keep_records(path, 5)
    assert path.read_text() == '{"kind": "train", "step": 1}\n'


def test_other_ranks_are_silent_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunConsole(tmp_path, 10, enabled=False) as console:
        console.banner([("data", "x")])
        console.start_bar()
        console.step(1, RECORD)
        console.say("hello")
        console.record({"kind": "valid", "step": 1})
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_an_error_is_the_last_line_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), RunConsole(tmp_path, 10):
        raise ValueError("broken")
    assert "stopped by ValueError: broken" in (tmp_path / "train.log").read_text()
