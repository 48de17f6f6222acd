"""Two evaluations compared event by event, and refused where they did not rank the same candidates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from trainer.cli import app
from trainer.errors import RunError
from trainer.evaluation.compare import compare, compare_lines, setting_lines
from trainer.evaluation.paired import check_same, paired, paired_segments, read_stored
from trainer.registry.model_card import _segment_lines

EVENTS, USERS = 400, 50  # of each task


def write_run(
    folder: Path, gain: float = 0.0, tasks: tuple[str, ...] = ("rec", "src"), **change: Any
) -> Path:
    """A run folder with an evaluation: the same ranks for every run but for the share `gain` of events that
    come first. change: of the protocol; first_event; columns to leave out."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    task = np.repeat(tasks, EVENTS)
    rank = rng.integers(2, 100, size=len(task)).astype(float)
    rank[rng.random(len(task)) < gain] = 1.0
    columns: dict[str, Any] = {
        "task": task,
        "user_id": [f"u{user}" for user in rng.integers(USERS, size=len(task))],
        "rank": rank,
        "num_tied": np.ones(len(task), np.int64),
        "event_id": np.arange(len(task)) + change.pop("first_event", 0),
        "history_length": np.where(np.arange(len(task)) % 2, "0", "1–4"),
    }
    for name in change.pop("without", ()):
        del columns[name]
    order = np.random.default_rng(len(folder.name)).permutation(len(task))
    pq.write_table(pa.table(columns).take(order), folder / "evaluation-test.parquet")
    protocol = {
        "candidates": "sampled",
        "num_negatives": 99,
        "manifest_hash": "abc",
        "split_fingerprint": "f",
    }
    metrics = dict.fromkeys(("recall@5", "recall@10", "ndcg@5", "ndcg@10"), 0.1)
    reports = {task: {**metrics, "num_events": EVENTS, "ci95": {}} for task in tasks}
    part = {"num_events": 200, "num_users": USERS, "ndcg@10": 0.1, "ci95": {"ndcg@10": [0.05, 0.15]}}
    segments = {task: {"history_length": {"0": part, "1–4": part}} for task in tasks}
    document = {"protocol": {**protocol, **change}, **reports, "segments": segments}
    (folder / "evaluation-test.json").write_text(json.dumps(document))
    (folder / "config.yaml").write_text(f"optim: {{lr: {0.1 + gain}}}\n")
    return folder


def test_differences_are_those_of_a_slow_bootstrap_over_users(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, gain) for name, gain in (("a", 0.0), ("bb", 0.2))]
    a, b = (read_stored(run, "test", run.name) for run in runs)
    check_same(a, b)
    found = paired(a, b)["src"]["recall@10"]
    hits = [(one.rank[one.task == "src"] <= 10).astype(float) for one in (a, b)]
    assert (found["a"], found["b"]) == tuple(pytest.approx(of.mean()) for of in hits)
    gain, user = hits[1] - hits[0], a.user[a.task == "src"]
    assert found["difference"] == pytest.approx(gain.mean())
    rng = np.random.default_rng(3)
    names, means = np.unique(user), []
    for _ in range(1000):
        rows = np.concatenate([np.flatnonzero(user == name) for name in rng.choice(names, len(names))])
        means.append(gain[rows].mean())
    assert found["ci95"] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.01)
    assert (found["num_events"], found["num_users"]) == (EVENTS, len(names))
    assert found["ci95"][0] > 0
    assert found["p_value"] < 0.01
    segments = paired_segments(a, b)["src"]["history_length"]
    assert {bucket: one["num_events"] for bucket, one in segments.items()} == {"0": 200, "1–4": 200}
    both = sum(one["difference"] for one in segments.values()) / 2
    assert both == pytest.approx(paired(a, b)["src"]["ndcg@10"]["difference"])


def test_a_file_without_num_tied_counts_ranks_as_they_stand(tmp_path: Path) -> None:
    run = write_run(tmp_path / "old", 0.2, without=("num_tied", "history_length"))
    stored = read_stored(run, "test", "old")
    assert (stored.num_tied == 1).all()
    assert not stored.segments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"manifest_hash": "xyz"}, "different data"),
        ({"num_negatives": 20}, "different candidates"),
        ({"candidates": "hard"}, "different candidates"),
        ({"first_event": 3}, "different events"),
    ],
)
def test_compare_refuses_other_candidates(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The fingerprint of the split is the same in every case."""
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b"), write_run(tmp_path / "c", **change)]
    with pytest.raises(RunError, match=message):
        compare(runs)
    compare(runs[:2])


def test_settings_that_only_one_model_has_are_counted() -> None:
    differing: dict[str, dict[str, Any]] = {
        "optim.lr": {"a/x": 0.1, "b/y": 0.2},
        "model.views": {"a/x": "both", "b/y": None},
        "tracking.also": {"a/x": "", "b/y": "tensorboard"},
        "run.x": {"a/x": True, "b/y": False},
    }
    assert setting_lines(differing) == [
        "Settings that differ",
        "  optim.lr: x 0.1, y 0.2",
        "  tracking.also: x '', y tensorboard",
        "  run.x: x true, y false",
        "  and 1 that not every one of these models has (--json lists them)",
    ]
    assert setting_lines({"optim.lr": {"a/x": 0.1, "b/x": 0.2}})[1] == "  optim.lr: a/x 0.1, b/x 0.2"
    assert setting_lines({}) == []


def test_compare_shows_the_difference_from_the_first_run(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", 0.2),
        write_run(tmp_path / "c", 0.1, ("rec",)),
    ]
    comparison = compare(runs)
    assert comparison["paired"]["against"] == str(runs[0])
    assert {name: list(tasks) for name, tasks in comparison["paired"]["runs"].items()} == {
        str(runs[1]): ["rec", "src"],
        str(runs[2]): ["rec"],
    }
    text = "\n".join(compare_lines(comparison))
    figures = comparison["paired"]["runs"][str(runs[1])]["src"]["ndcg@10"]
    assert f"ndcg@10 {figures['difference']:+.4f}".replace("0.", ".") in text
    assert "by history length" not in text
    assert "by history length" in "\n".join(compare_lines(comparison, with_segments=True))
    json.dumps(comparison, allow_nan=False)


def test_a_key_of_today_is_no_difference_from_an_older_run(tmp_path: Path) -> None:
    """It was not there yet, and stands for its default."""
    runs = [write_run(tmp_path / name, gain=0.5) for name in ("older", "newer")]
    (tmp_path / "newer" / "config.yaml").write_text("optim: {lr: 0.6, warmup_steps: 7}\nrun: {seed: 0}\n")
    assert list(compare(runs)["settings"]) == ["optim.warmup_steps"]


def test_tasks_may_differ_for_a_table_and_not_for_a_gate(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", 0.5, ("rec",))]
    a, b = (read_stored(run, "test", run.name) for run in runs)
    check_same(a, b, same_tasks=False)
    with pytest.raises(RunError, match="different tasks"):
        check_same(a, b)


def test_samples_of_the_whole_catalogue_are_compared_on_the_events_of_both(tmp_path: Path) -> None:
    """A joint model's sample has fewer events of a task than that of a model of this task alone."""
    runs = [
        write_run(tmp_path / "joint", candidates="full"),
        write_run(tmp_path / "rec", 0.5, ("rec",), candidates="full", first_event=100),
        write_run(tmp_path / "apart", 0.5, ("rec",), candidates="full", first_event=1000),
        write_run(tmp_path / "other", candidates="full", first_event=1000, manifest_hash="def"),
    ]
    for run in runs:
        for ending in ("json", "parquet"):
            (run / f"evaluation-test.{ending}").rename(run / f"evaluation-test-full.{ending}")
    comparison = compare(runs[:2], candidates="full")
    found = comparison["paired"]["runs"][str(runs[1])]
    assert list(found) == ["rec"] and found["rec"]["ndcg@10"]["num_events"] == 300
    assert any(line.endswith("(300 events)") for line in compare_lines(comparison))
    with pytest.raises(RunError, match=r"no event was ranked by all.*--candidates full --events 0"):
        compare(runs[:3], candidates="full")
    with pytest.raises(RunError, match="different data"):  # no further ranking would help
        compare(runs, candidates="full")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "evaluation-test.parquet").unlink()
    with pytest.raises(
        RunError, match=rf"evaluation-test\.parquet is missing\..*evaluate {run} --split test"
    ):
        compare([run])
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").touch()
    with pytest.raises(RunError, match=r"new/evaluation-test\.json is missing\. Make it with"):
        compare([run, tmp_path / "new"])
    with pytest.raises(RunError, match="nowhere is not a run folder"):
        compare([run, tmp_path / "nowhere"])


def test_command_compare(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", 0.2))]
    done = CliRunner().invoke(app, ["compare", *runs, "--segments"])
    assert done.exit_code == 0, done.exception
    assert f"Difference from {runs[0]}" in done.stdout
    assert "NDCG@10" not in done.stdout and "ndcg@10 by history length" in done.stdout
    assert isinstance(CliRunner().invoke(app, ["compare", *runs, "--candidates", "hard"]).exception, RunError)
    soft = CliRunner().invoke(app, ["compare", *runs, "--candidates", "soft"])
    assert "sampled, hard or full, got soft" in str(soft.exception)
    for run in runs:
        for kind in ("json", "parquet"):
            (Path(run) / f"evaluation-test.{kind}").rename(Path(run) / f"evaluation-test-hard.{kind}")
    hard = CliRunner().invoke(app, ["compare", *runs, "--candidates", "hard"])
    assert hard.exit_code == 0 and hard.stdout.startswith("Candidates: hard")


def test_model_card_shows_segments(tmp_path: Path) -> None:
    evaluation = json.loads((write_run(tmp_path / "a") / "evaluation-test.json").read_text())
    lines = _segment_lines(evaluation)
    assert "| rec | history length | 1–4 | 200 | 0.1000 [0.0500, 0.1500] |" in lines
    assert _segment_lines({"protocol": {}}) == []
