"""`serving.retriever`: another trained run as a first stage. Its best items of the whole catalogue are one
more list beside those of the model's own indexes (retrieval.py joins them), for the tasks that it serves.

FOLDER/model  items  retrieval      what a registered version holds of it, in artifacts/retriever; as the
                                    version's own, with "retriever" in items/serving.json
"""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.schema import TASKS
from trainer.batch import Batch
from trainer.config import Config
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, DataError, RequestError, RunError
from trainer.models.contract import task_names
from trainer.models.zoo import model_class
from trainer.runs.retriever_facts import RETRIEVER, retriever_words
from trainer.runs.run_folder import RunFolder, describe_status
from trainer.runs.weights import WEIGHTS, load_run_config, read_model_document
from trainer.runtime.device import autocast
from trainer.runtime.files import file_sha256
from trainer.runtime.progress import Notify, silent
from trainer.serving.artifacts import read_serving_facts, write_items
from trainer.serving.requests import ParsedRequest
from trainer.serving.retrieval import (
    NO_ROWS,
    RETRIEVAL,
    Retrieval,
    best_scored,
    model_identity,
    questions_of,
    run_retrieval,
    version_retrieval,
)
from trainer.serving.scorer import Scorer

GOOD_ONES = "two_tower, sasrec, lightgcn or item_knn"  # of many; Ranker.retrieves() decides


@dataclass(frozen=True)
class Retriever:
    """A model that finds candidates for another one. Thread-safe.

    retrieval: its own indexes; None: it scores every item. facts: {"run", "model", "title", "tasks",
    "weights_sha256"}, what evaluations, model cards and answers say.
    """

    scorer: Scorer
    retrieval: Retrieval | None
    facts: Mapping[str, Any]

    @classmethod
    def from_run(cls, run_dir: str | Path, device: str | None = None, notify: Notify = silent) -> "Retriever":
        """A run folder, not checked (open_retriever). Its indexes, if it has views, are kept in
        RUN/retrieval."""
        scorer = Scorer.from_run(run_dir, device)
        facts = {
            "run": str(run_dir),
            "model": scorer.model.settings.name,
            "title": scorer.model.title,
            "tasks": list(task_names(scorer.model)),
            "weights_sha256": file_sha256(RunFolder(run_dir).model / WEIGHTS),
        }
        return cls(scorer, run_retrieval(Path(run_dir), scorer.model, notify), facts)

    @classmethod
    def from_artifacts(cls, folder: Path, device: str | None = None) -> "Retriever":
        """What save() wrote."""
        scorer = Scorer.from_artifacts(folder, device)
        retrieval = version_retrieval(folder, scorer.model)
        return cls(scorer, retrieval, read_serving_facts(folder / "items")[RETRIEVER])

    def save(self, folder: Path) -> None:
        """FOLDER, which a registered version holds: weights, item tables, ids, indexes. No texts: it answers
        nobody."""
        run = RunFolder(self.facts["run"])
        data = PreparedFolder.open(load_run_config(run.path).data)
        write_items(folder / "items", self.scorer, data.items("item_id"), {RETRIEVER: dict(self.facts)})
        shutil.copytree(run.model, folder / "model")
        if self.retrieval is not None:
            shutil.copytree(run.retrieval, folder / RETRIEVAL)

    def best(self, parsed: ParsedRequest, num_items: int, exclude: Sequence[int] = ()) -> np.ndarray:
        """Rows of the best items for a request, best first, none of `exclude`. None at all for a task that it
        does not serve, and for a history given by hand where it knows users by their rows only."""
        if parsed.task not in self.scorer.model.tasks:
            return NO_ROWS
        try:
            if self.retrieval is None:
                return _best_known(self.scorer.score_catalogue(parsed), num_items, exclude)
            questions = self.scorer.questions(parsed, self.retrieval.views, self.retrieval.means)
        except RequestError:
            return NO_ROWS
        return self.retrieval.candidates(questions, parsed.task, num_items, exclude)

    def best_of_events(
        self, batch: Batch, whole: Batch, num_items: int, exclude: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """The same for each event of a batch of the prepared folder, whose histories are as long as the
        retriever reads them, and in `whole` as long as they are known; not of a retriever that has answered
        a request, whose queries its tables then hold. exclude: for each event."""
        found = [NO_ROWS] * batch.num_events
        served = torch.isin(batch.task, torch.tensor(self.scorer.model.tasks))
        places = served.nonzero()[:, 0].tolist()
        if not places:
            return found
        model = self.scorer.model
        precision = self.scorer.precision if model.device.type == "cuda" else "fp32"  # as a service has it
        with torch.inference_mode(), autocast(model.device, precision):
            events = model.prepare(batch.take(served)).to(model.device)
            if self.retrieval is None:
                scores_BI = model.score_catalogue(events).float().cpu().clone()
                for scores_I, place in zip(scores_BI, places, strict=True):
                    self.scorer.refuse_nan(scores_I, f"event {int(batch.event_id[place])}")
                    found[place] = _best_known(scores_I, num_items, exclude[place])
                return found
            asked = questions_of(model, self.retrieval, events, whole.take(served).to(model.device))
        for row, place in enumerate(places):
            questions = {name: vectors_BW[row] for name, vectors_BW in asked.items()}
            task = int(batch.task[place])
            found[place] = self.retrieval.candidates(questions, task, num_items, exclude[place])
        return found


def _best_known(scores_I: Tensor, num_items: int, exclude: Sequence[int]) -> np.ndarray:
    """best_scored() without the items of the lowest score: a counted model gives it to all that it knows
    nothing about, and they would take places from what the indexes find."""
    scores_I[scores_I == scores_I.min()] = -torch.inf
    return best_scored(scores_I, num_items, exclude)


# ---- which retriever, and whether it fits ------------------------------------------------------------------


def chosen_retriever(config: Config, asked: str | Path | None) -> str | Path:
    """What is asked for goes before the run's own serving.retriever; "" is none."""
    return config.serving.retriever if asked is None else asked


def open_retriever(
    run: str | Path,
    model_dir: Path,
    tasks: Sequence[str],
    item_ids: Sequence[Any],
    retrieval: Retrieval | None,
    device: str | None = None,
    notify: Notify = silent,
) -> Retriever | None:
    """The retriever of a run folder for a model; None for "".

    model_dir, tasks ("rec", "src"), item_ids, retrieval: of the model that ranks. A task that the retriever
    does not serve is told to `notify`. Raises ConfigError or RunError for a run that cannot be its retriever,
    DataError for one of other data.
    """
    if not str(run):
        return None
    if str(run).startswith("models:"):
        raise ConfigError(f"retriever {run}: it must be a run folder. Give the run that was registered")
    if retrieval is None:
        name = read_model_document(model_dir)["name"]
        raise ConfigError(
            f"retriever {run}: {name} ranks the whole catalogue itself, so there is no choice of candidates "
            "to add to. Leave the retriever out: --retriever ''"
        )
    _check_run(RunFolder(run), model_dir, tasks)
    retriever = Retriever.from_run(run, device, notify)
    if list(retriever.scorer.item_ids) != list(item_ids):
        raise DataError(f"retriever {run}: its catalogue has other item ids. {_same_folder(model_dir)}")
    if others := [task for task in tasks if task not in retriever.facts["tasks"]]:
        notify(f"{retriever_words(retriever.facts)} does not serve {others[0]}: the model's own indexes do")
    return retriever


def _check_run(run: RunFolder, model_dir: Path, tasks: Sequence[str]) -> None:
    document, own = read_model_document(run.model), read_model_document(model_dir)
    where, name = f"retriever {run.path}", document["name"]
    status = run.read_status().get("status")
    if status not in (None, "finished"):  # None: an older run does not say
        raise RunError(
            f"{where} is not finished (it {describe_status(status)}). Continue it with: gensr train "
            f"{shlex.quote(str(run.config))} --resume auto"
        )
    if model_identity(run.model) == model_identity(model_dir):
        raise ConfigError(f"{where} is the model itself. Give the run of another one, or leave it out")
    kind = model_class(name)
    if not kind.retrieves():
        raise ConfigError(
            f"{where}: {name} has no cheap scores of the whole catalogue, so it cannot choose from it. "
            f"Take a run of one that has, such as {GOOD_ONES}"
        )
    for key, meaning in (("split_fingerprint", "split"), ("manifest_hash", "prepared folder")):
        if document[key] != own[key]:
            raise DataError(
                f"{where} was trained on another {meaning} ({key} {document[key][:12]}, the model's is "
                f"{own[key][:12]}). {_same_folder(model_dir)}"
            )
    served = document.get("tasks", [TASKS[task] for task in kind.tasks])
    if not set(served) & set(tasks):
        raise ConfigError(
            f"{where} serves {' and '.join(served)} only, and the model {' and '.join(tasks)}. Take one that "
            "serves a task of the model"
        )


def _same_folder(model_dir: Path) -> str:
    """How to make one that fits."""
    run = RunFolder(model_dir.parent)
    where = run.read_config().data.dir if run.config.is_file() else "the model's prepared folder"
    return f"Train one on the same: gensr train PRESET data.dir={where} run.dir=NEW"
