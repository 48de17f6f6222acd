"""Logs of recommendations alone and of searches alone, from the raw log to a registered version's answers."""

import json
from pathlib import Path

import pytest

from data_shards.prepare import prepare
from tests.conftest import SMALL
from tests.worlds import write_tables
from trainer.cf.build import train_cf
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, RequestError
from trainer.evaluation.full import evaluate_full
from trainer.evaluation.sampled import evaluate_run
from trainer.registry.versions import register
from trainer.runs.weights import read_model_document
from trainer.serving.recommend import Recommender
from trainer.training.loop import train
from trainer.training.plan import dry_run

SETTINGS = [
    "model.backbone=scratch:nano",
    "data.history_max=10",
    "data.num_negatives=2",
    "data.search_share=0.5",
    "optim.global_batch_size=16",
    "optim.micro_batch_size=8",
    "run.max_steps=2",
    "run.valid_events=16",
    "run.threads=1",
]


def make_folder(folder: Path, task: str, anonymised: bool) -> Path:
    """The tiny world's clicks of one task."""
    raw = write_tables(folder / "raw", anonymised=anonymised)
    lines = (raw / "events.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["task"] == task]
    (raw / "events.jsonl").write_text("\n".join(kept) + "\n")
    prepare("tables", raw, folder / "data", SMALL)
    train_cf(folder / "data", ["cf.dim=16", "cf.max_epochs=2", "cf.num_folds=2"])
    return folder / "data"


@pytest.mark.parametrize(("task", "anonymised"), [("rec", False), ("src", False), ("rec", True)])
def test_a_log_of_one_task_goes_the_whole_way(tmp_path: Path, task: str, anonymised: bool) -> None:
    data, run_dir = make_folder(tmp_path, task, anonymised), tmp_path / "runs" / "one"
    places = [f"data.dir={data}", f"run.dir={run_dir}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    other = "src" if task == "rec" else "rec"
    for start in (train, dry_run):
        with pytest.raises(ConfigError, match=rf"only {task} is learned"):
            start(load_config(None, [*places, *SETTINGS, f"run.select_metric={other}/mrr"]))
    config = load_config(None, [*places, *SETTINGS])
    dry_run(config)
    result = train(config)
    assert result.metrics["mean/ndcg@10"] == result.metrics[f"{task}/ndcg@10"]
    assert not [name for name in result.metrics if name.startswith(other)]
    assert read_model_document(run_dir / "model")["tasks"] == [task]
    for document in (evaluate_run(run_dir), evaluate_full(run_dir, max_events=10)):
        assert task in document and other not in document
    answers_only(Recommender.from_run(run_dir, "cpu"), data, task)
    register(run_dir, "one-task")


def answers_only(recommender: Recommender, data: Path, task: str) -> None:
    item_ids = PreparedFolder.at(data).item_ids()
    history = [{"item_id": item, "task": task} for item in item_ids[:3]]
    rec = {"task": "rec", "history": history, "k": 5}
    src = {"task": "src", "history": history, "query": "garden lamp", "k": 5}
    if recommender.query_mode == "words":
        src["query"] = [1000, 2000]
    wanted, refused = (rec, src) if task == "rec" else (src, rec)
    assert len(recommender.recommend(wanted)["items"]) == 5
    served = "recommendations" if task == "rec" else "searches"
    with pytest.raises(RequestError, match=f"answers {served} only"):
        recommender.recommend(refused)
