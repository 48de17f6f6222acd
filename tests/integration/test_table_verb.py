"""gensr table as a user runs it: two systems, one of which fails first; the same command goes on. And two
runs at once, interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer.cli import app


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_systems_go_on_after_a_failure(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "table"
    command = ["table", str(prepared), str(out), "--models", "item_knn,sasrec", "--seeds", "1"]
    command += ["--max-steps", "2", "--candidates", "sampled", "--trials", "1", "run.valid_events=8"]
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "item_knn").write_text("not a folder")
    first = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    document = json.loads((out / "table.json").read_text())
    rows = {row["model"]: row for row in document["rows"]}
    assert rows["item_knn"]["errors"]["item_knn seed-0"].startswith("gensr train: ")
    assert not rows["sasrec"]["errors"] and set(rows["sasrec"]["results"]["sampled"]) == {"rec"}
    assert rows["sasrec"]["parameters"] > 1000 and rows["sasrec"]["tuning"]["best_trial"] == 0
    ranks = out / "runs" / "sasrec" / "seed-0" / "evaluation-test.parquet"
    written_ns = ranks.stat().st_mtime_ns

    (out / "runs" / "item_knn").unlink()
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert "| item-kNN |" in again.output and "Failed" not in again.output
    document = json.loads((out / "table.json").read_text())
    results = {row["model"]: row["results"]["sampled"]["rec"] for row in document["rows"]}
    events = document["num_events"]["sampled"]["rec"]
    for model in results:
        own = json.loads((out / "runs" / model / "seed-0" / "evaluation-test.json").read_text())["rec"]
        assert own["num_events"] == events
        assert results[model]["ndcg@10"]["value"] == pytest.approx(own["ndcg@10"])
    assert ranks.stat().st_mtime_ns == written_ns, "a finished cell was computed again"
    assert all((out / f"table.{kind}").is_file() for kind in ("md", "csv", "html"))
    parent = json.loads((out / "tracking.json").read_text())["run_id"]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    children = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent}'")
    names = {run.info.run_name for run in children}
    assert names == {"item_knn-seed-0", "sasrec-seed-0"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two runs at once need two cores")
def test_two_at_once_are_interrupted_and_go_on(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "table"
    command = [sys.executable, "-m", "gensr", "table", str(prepared), str(out), "--jobs", "2", "--seeds", "2"]
    command += ["--models", "sasrec,gru4rec", "--candidates", "sampled", "--max-steps", "12"]
    command += ["run.valid_events=8", "run.validate_every_steps=12", "run.log_every_steps=1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("OMP_NUM_THREADS", None)
    with (tmp_path / "said").open("w") as said:
        first = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        runs = [out / "runs" / "sasrec" / name for name in ("seed-0", "seed-1")]
        steps = [run / "metrics.jsonl" for run in runs]
        end_s = time.monotonic() + 300
        while not all(path.is_file() and path.stat().st_size for path in steps):
            assert time.monotonic() < end_s and first.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        assert first.wait(120) == 75
    text = (tmp_path / "said").read_text()
    assert "the same command resumes" in text and not (out / "table.json").exists(), text
    assert [line.split("  ")[0] for line in text.splitlines()[:2]] == [
        "[1/4] sasrec seed-0",
        "[2/4] sasrec seed-1",
    ]
    stopped = [json.loads((run / "status.json").read_text()) for run in runs]
    assert [status["status"] for status in stopped] == ["stopped"] * 2, "both have saved"
    assert all(list((run / "checkpoints").iterdir()) for run in runs)

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0 and "Failed" not in again.stdout, again.stderr
    document = json.loads((out / "table.json").read_text())
    for row in document["rows"]:
        assert [cell["name"] for cell in row["cells"]] == ["seed-0", "seed-1"] and not row["errors"]
        assert [cell["step"] for cell in row["cells"]] == [12, 12]
    logs = [path.read_text() for path in sorted((out / "logs").iterdir())]
    assert len(logs) == 4 and "continuing step-" in logs[2], "where it was interrupted it goes on"
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(f"{share} CPU thread" in text for text in logs)
    # all have written to one sqlite file at once
    from mlflow.tracking import MlflowClient

    found = MlflowClient(f"sqlite:///{out}/mlflow.db").search_runs(["1"])
    tracked = {run.info.run_name: run for run in found if "mlflow.parentRunId" in run.data.tags}
    assert len(tracked) == 4 and {run.info.status for run in tracked.values()} == {"FINISHED"}
    assert not any("locked" in text for text in logs)
