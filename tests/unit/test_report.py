"""Pictures and tables from metrics.jsonl; what is recorded about code and machine."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from data_shards.settings import to_yaml
from tests.runs import EVALUATION
from tests.tiny_folder import make_tiny_folder
from trainer.analysis.drawing import REC, SEARCH
from trainer.analysis.figures import last_screen, metric_rows, plot_run, read_records
from trainer.analysis.pages import Table
from trainer.analysis.report.asked import Read
from trainer.analysis.report.sections import _read, provenance, results
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.errors import RunError
from trainer.runs.checkpoint import Progress
from trainer.runs.provenance import environment_facts, git_facts
from trainer.runs.run_folder import RunFolder
from trainer.runtime.launch import num_cores

METRICS = {"rec/recall@10": 0.5, "rec/ndcg@10": 0.25, "mean/ndcg@10": 0.25}


def write(folder: Path, *records: dict[str, object]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_pictures_of_losses_and_metrics(tmp_path: Path) -> None:
    losses = [
        {"kind": "train", "step": step, "loss": 1 / step, "answer_loss": 0.9 / step} for step in range(1, 20)
    ]
    write(tmp_path, *losses, {"kind": "valid", "step": 10, **METRICS})
    files = plot_run(tmp_path)
    assert [path.name for path in files] == ["loss.png", "metrics.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["loss.png", "metrics.png"]


def test_pictures_of_training_have_the_colours_of_the_tasks(tmp_path: Path) -> None:
    for_tasks = {"rec/mrr": 0.1, "src/mrr": 0.5}
    write(tmp_path, {"kind": "valid", "step": 1, **for_tasks}, {"kind": "valid", "step": 2, **for_tasks})
    (path,) = plot_run(tmp_path)
    seen = {tuple(pixel) for pixel in (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)}
    for colour in (REC, SEARCH):
        assert tuple(bytes.fromhex(colour[1:])) in seen
    assert (31, 119, 180) not in seen  # the first of matplotlib's own


def test_a_picture_without_data_is_left_out(tmp_path: Path) -> None:
    # no logarithm of these
    write(tmp_path, {"kind": "train", "step": 1, "loss": 0.0, "contrastive_loss": -1.0})
    assert [path.name for path in plot_run(tmp_path)] == ["loss.png"]


def test_half_a_line_is_skipped_and_a_missing_file_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n{"kind"')
    assert len(read_records(tmp_path)) == 1
    with pytest.raises(RunError, match=r"metrics\.jsonl is missing"):
        read_records(tmp_path / "nothing")


def test_table_of_metrics() -> None:
    rows = metric_rows(METRICS)
    assert len(rows) == 3 and rows[1].split() == ["rec", "–", "0.5000", "–", "0.2500", "–"]


def test_a_report_shows_the_planted_optimum_of_the_same_events(tmp_path: Path) -> None:
    folder, run = PreparedFolder.at(make_tiny_folder(tmp_path / "data")), RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(to_yaml(load_config(None, [f"data.dir={folder.path}", "model.name=bpr_mf"])))
    (tmp_path / "run" / "report").mkdir()
    (run.path / "evaluation-test.json").write_text(json.dumps(EVALUATION))

    def models() -> list[str]:
        (section,) = results(run)
        return [row[1] for part in section.parts if isinstance(part, Table) for row in part.rows]

    assert "planted optimum" not in models()
    report: Any = EVALUATION["rec"]
    for number, shown in ((40, True), (41, False)):
        document = {"split_fingerprint": folder.manifest.fingerprint, "rec": {**report, "num_events": number}}
        (folder.path / "optimum.json").write_text(json.dumps(document))
        assert ("planted optimum" in models()) == shown
    shutil.rmtree(folder.path)
    assert "planted optimum" not in models()


def test_the_last_screen_says_what_next(tmp_path: Path) -> None:
    """In words that can be copied: a path may have blanks."""
    run = tmp_path / "my run"
    text = "\n".join(last_screen(run, Progress(step=20, best_step=10, best_metrics=METRICS, train_s=61), 500))
    for part in (
        "best step 10 of 20, 0:01:01",
        "500 events, sampled",
        f"gensr evaluate '{run}' --split",
        f"gensr register '{run}' NAME",
    ):
        assert part in text


def test_a_change_anywhere_in_the_checkout_is_noted(tmp_path: Path) -> None:
    """Also in other folders than that of the code that asks."""

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    for name in ("trainer/runs/here.py", "trainer/models/there.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    assert git_facts(tmp_path / "trainer" / "runs")["dirty"] is False
    (tmp_path / "trainer" / "models" / "there.py").write_text("x = 2\n")
    facts = git_facts(tmp_path / "trainer" / "runs")
    assert facts["dirty"] is True and "+x = 2" in facts["diff"]


def test_facts_about_code_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr("sys.argv", ["gensr", "train", "tracking.uri=postgresql://me:secret@host/db"])
    facts = environment_facts()
    assert facts["cpu_cores"] >= 1 and facts["packages"]["torch"] and facts["slurm"] == {"SLURM_JOB_ID": "17"}
    assert "secret" not in facts["command"]
    git = git_facts()
    assert git == {} or len(git["commit"]) == 40
    json.dumps(facts)


def test_the_page_names_the_machine(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps(environment_facts()))
    [section] = provenance(RunFolder(tmp_path))
    [table, _] = section.parts
    assert isinstance(table, Table) and not table.head
    assert {row[0]: row[1] for row in table.rows}["machine"].startswith(f"{num_cores()} cores, ")


def test_weights_of_the_history_stand_apart_from_titles() -> None:
    assert _read(Read("lamp, 3 cm", True, {"cf": 0.1, "semantic": 0.25})) == (
        "lamp, 3 cm (searched, cf .100, semantic .250)"
    )
    assert _read(Read("lamp, 3 cm", False, {})) == "lamp, 3 cm"
