"""gensr table as a user runs it: two systems, one of which fails first; the same command goes on."""

import json
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
