"""The planted optimum: how well a simulated world's own preferences rank the stored candidates of a split. No
model can be expected to do better: it knows what is in no log, such as what the user has in mind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.schema import TASKS
from data_shards.simulate.oracle import OPTIMUM_FILE, Oracle
from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError
from trainer.evaluation.ranking import rank_events
from trainer.evaluation.sampled import BASELINE_BATCH, task_reports
from trainer.runs.run_folder import read_json
from trainer.runtime.files import write_json

TITLE = "planted optimum"


def write_optimum(folder: PreparedFolder, raw: str | Path) -> dict[str, Any]:
    """Beside what it is computed from: FOLDER/optimum.json → optimum_report()."""
    report = optimum_report(folder, raw)
    write_json(folder.path / OPTIMUM_FILE, report)
    return report


def read_optimum(folder: PreparedFolder) -> dict[str, Any]:
    """What write_optimum() wrote; {} where a folder has none, or that of another split."""
    found = read_json(folder.path / OPTIMUM_FILE)
    return found if found.get("split_fingerprint") == folder.manifest.fingerprint else {}


def optimum_of(data_dir: str | Path, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The optimum's reports of those tasks in which it has ranked the same events as an evaluation of sampled
    candidates of the test split; {} without any, and for a folder that is not on this machine."""
    try:
        found = read_optimum(PreparedFolder.at(data_dir))
    except DataError:
        return {}
    same = [
        task
        for task in TASKS
        if task in found
        and task in evaluation
        and found[task]["num_events"] == evaluation[task].get("num_events")
    ]
    return {task: found[task] for task in same}


def optimum_report(folder: PreparedFolder, raw: str | Path) -> dict[str, Any]:
    """{"split", "split_fingerprint", "rec": {"ndcg@10": …}, "src": {…}}, as in evaluation-test.json.

    raw: the logs that `gensr simulate` wrote and the folder was prepared from. Raises DataError when they are
    others.
    """
    oracle = Oracle(Path(raw), folder.user_ids(), folder.item_ids())

    def score(batch: Batch) -> Tensor:
        rows = (batch.user, batch.clicked, batch.task, batch.candidates)
        scores: np.ndarray = oracle.scores(*(row.numpy() for row in rows))
        return torch.from_numpy(scores)

    data = DataConfig(history_max=folder.manifest.history_max)
    ranks = rank_events(score, EvalStream(folder, "test", data, BASELINE_BATCH))
    return {"split": "test", "split_fingerprint": folder.manifest.fingerprint, **task_reports(ranks)}
