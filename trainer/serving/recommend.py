"""From a request to answers: the one class that `gensr recommend`, `search` and `score`, the registered model
and a service call.

A request as in serving/requests.py, with these differences:
    "candidates": [item ids]    they are scored; or leave it out, and the whole catalogue is searched: "k":
                                how many items to answer (10)
    "user_id"                   instead of "history" where the users' clicks are known (a prepared folder is
                                there). Beside a history with clicks it is carried like any other field;
                                beside an empty one it is refused: [] says that there are no clicks
    "num_candidates": 400       what retrieval hands to the ranking
    "include_seen": false       whether items of the history may be answered
    "explain": false            adds to each item how much each history item counts (models that can say)
    "with_text": false          adds each item's text
Without a history and a query the k most clicked items of the training data are ranked, where it is there.
The answer: {"items": [{"item_id", "score"}, …] best first, "scores": the probability of each candidate in the
order given (or of `items`), "model": what answered}
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.settings import read_yaml
from trainer.data.folder import PreparedFolder
from trainer.errors import RequestError
from trainer.models.contract import Ranker, task_names
from trainer.runs.retriever_facts import RETRIEVER
from trainer.runs.run_folder import RunFolder
from trainer.runs.weights import load_run_config
from trainer.runtime.progress import Notify, silent
from trainer.serving.artifacts import read_serving_facts
from trainer.serving.requests import ParsedRequest, is_absent, missing
from trainer.serving.retrieval import NO_ROWS, Retrieval, best_scored, run_retrieval, version_retrieval
from trainer.serving.retriever import Retriever, chosen_retriever, open_retriever
from trainer.serving.scorer import Scorer
from trainer.serving.users import Users, open_users

DEFAULT_K, MAX_K = 10, 1000
NUM_CANDIDATES, MAX_NUM_CANDIDATES = 400, 2000
# how a request is answered, beside what it asks → the default
SETTINGS: Mapping[str, int | bool] = {
    "k": DEFAULT_K,
    "num_candidates": NUM_CANDIDATES,
    "include_seen": False,
    "explain": False,
    "with_text": False,
}


FIELDS = ("user_id", "history", "task", "query", "candidates", *SETTINGS)


@dataclass(frozen=True)
class Read:
    """A request and what is ranked for it: its own candidates, or those found in the whole catalogue."""

    request: Mapping[str, Any]
    found: ParsedRequest
    whole_catalogue: bool


class Recommender:
    """A model that answers requests: ranks given candidates, or finds them in the whole catalogue first.
    Thread-safe."""

    def __init__(
        self,
        scorer: Scorer,
        retrieval: Retrieval | None,
        facts: Mapping[str, Any],
        items_file: Path,
        users: Users,
        retriever: Retriever | None = None,
    ) -> None:
        """retrieval: None for a model without views, which ranks the whole catalogue itself. facts: what an
        answer says about the model. items_file: parquet with a column "text". users: whose histories are
        known, or why they are not. retriever: another model that finds candidates, too."""
        self.scorer, self.retrieval, self.retriever, self.users = scorer, retrieval, retriever, users
        self.facts = dict(facts) | ({RETRIEVER: retriever.facts["run"]} if retriever is not None else {})
        self._items_file = items_file
        self._texts: pa.ChunkedArray | None = None

    @classmethod
    def from_run(
        cls,
        run_dir: str | Path,
        device: str | None = None,
        notify: Notify = silent,
        retriever: str | Path | None = None,
        data_dir: str | Path = "",
    ) -> "Recommender":
        """A run folder and its prepared folder. The indexes are kept in RUN/retrieval; they are built when
        they are missing or of other weights. retriever: a run folder, "" for none; default: the run's
        serving.retriever. `data_dir`: where its prepared folder lies now; default: the run's data.dir."""
        run_dir = Path(run_dir)
        scorer = Scorer.from_run(run_dir, device, data_dir)
        config = load_run_config(run_dir, data_dir)
        folder = PreparedFolder.open(config.data)
        retrieval = run_retrieval(run_dir, scorer.model, notify)
        facts = {"run": str(run_dir), "manifest_hash": folder.manifest.hash}
        chosen = chosen_retriever(config, retriever)
        other = _retriever_for(scorer, chosen, RunFolder(run_dir).model, retrieval, device, notify)
        return cls(scorer, retrieval, facts, folder.catalog / "items.parquet", Users(folder), other)

    @classmethod
    def from_artifacts(
        cls,
        folder: str | Path,
        device: str | None = None,
        data_dir: str | Path = "",
        notify: Notify = silent,
        retriever: str | Path | None = None,
        version: Mapping[str, Any] | None = None,
    ) -> "Recommender":
        """A registered version: its folder of artifacts. `data_dir`: prepared folder for requests by user_id;
        default: where it was when registered. retriever: a run folder, "" for none; default: the one that
        the version holds, if any. version: its {"name", "version"}; default: what MLflow noted beside it."""
        folder = Path(folder)
        scorer = Scorer.from_artifacts(folder, device)
        retrieval = version_retrieval(folder, scorer.model, notify)
        serving = read_serving_facts(folder / "items")
        noted = noted_version(folder.parent) if version is None else version
        facts = {**noted, **{key: serving[key] for key in ("manifest_hash", "commit")}}
        users = open_users(
            data_dir or serving.get("data_dir", ""), serving["manifest_hash"], must_be_there=bool(data_dir)
        )
        if retriever is None and (folder / RETRIEVER).is_dir():
            other: Retriever | None = Retriever.from_artifacts(folder / RETRIEVER, device)
        else:
            other = _retriever_for(scorer, retriever or "", folder / "model", retrieval, device, notify)
        return cls(scorer, retrieval, facts, folder / "items" / "items.parquet", users, other)

    def score(
        self, requests: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None
    ) -> list[list[float]]:
        """P("Yes") of each request's candidates, in the order given. Raises RequestError that names the first
        bad request. names: what it calls them; default: by their numbers."""
        names = _names(requests) if names is None else names
        for request, where in zip(requests, names, strict=True):
            if is_absent(request.get("candidates")):
                raise RequestError(f"{where}: candidates is missing: give the item ids to score")
        return [answer["scores"] for answer in self.answer(requests, names)]

    def recommend(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request (above). Raises RequestError."""
        return self.answer([request])[0]

    def answer(
        self, requests: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """The answers to several requests, ranked together in batches. Raises RequestError that names the
        first bad request before anything is scored."""
        named = zip(requests, _names(requests) if names is None else names, strict=True)
        return self._answers([self._read(request, where) for request, where in named])

    def answer_or_errors(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | RequestError]:
        """The same, with the error of a bad request in its place: the others are still ranked together."""
        read: list[Read | RequestError] = []
        for request in requests:
            try:
                read.append(self._read(request, "the request"))
            except RequestError as error:
                read.append(error)
        answers = iter(self._answers([one for one in read if not isinstance(one, RequestError)]))
        return [one if isinstance(one, RequestError) else next(answers) for one in read]

    def _answers(self, read: Sequence[Read]) -> list[dict[str, Any]]:
        scores = self.scorer.score_parsed([one.found for one in read])
        return [self._answer(one, row) for one, row in zip(read, scores, strict=True)]

    # ---- one request ---------------------------------------------------------------------------------------

    def _read(self, request: Mapping[str, Any], where: str) -> Read:
        refuse_misspelt(request, where)
        for name, default in SETTINGS.items():
            if isinstance(default, bool):
                _flag(request, name, where)
        parsed = self._parse(request, where)
        if parsed.candidates:
            return Read(request, parsed, whole_catalogue=False)
        return Read(request, self._retrieved(parsed, request, where), whole_catalogue=True)

    def _parse(self, request: Mapping[str, Any], where: str) -> ParsedRequest:
        if not is_absent(request.get("user_id")) and missing(request.get("history")):
            if not is_absent(request.get("history")):
                raise RequestError(
                    f"{where}: history is empty and user_id is given: leave history out (or null) for the "
                    "user's clicks, or user_id for no clicks"
                )
            history = self.users.history(request["user_id"], self.scorer.item_ids, where)
            parsed = self._parse({**request, "user_id": None, "history": history}, where)
            return replace(parsed, user=self.users.row(request["user_id"], where))
        return self.scorer.parse(request, where, needs_candidates=not is_absent(request.get("candidates")))

    def _retrieved(self, parsed: ParsedRequest, request: Mapping[str, Any], where: str) -> ParsedRequest:
        """The request with candidates from the whole catalogue."""
        k = _count(request, "k", DEFAULT_K, MAX_K, where)
        wanted = max(k, _count(request, "num_candidates", NUM_CANDIDATES, MAX_NUM_CANDIDATES, where))
        if not parsed.items and parsed.query is None and not self.users.reason:
            return replace(parsed, candidates=self.users.popular(k).tolist())
        seen = [] if _flag(request, "include_seen", where) else parsed.items
        return replace(parsed, candidates=self.candidates(parsed, wanted, seen, where).tolist())

    def candidates(
        self, parsed: ParsedRequest, num_candidates: int, exclude: Sequence[int], where: str = "the request"
    ) -> np.ndarray:
        """Rows of the items that retrieval and the retriever find, best first; of a model without views, its
        own best. Raises RequestError when there is nothing to ask with."""
        if self.retrieval is None:
            return best_scored(self.scorer.score_catalogue(parsed), num_candidates, exclude)
        beside = NO_ROWS
        if self.retriever is not None:
            beside = self.retriever.best(parsed, num_candidates, exclude)
        questions = self.scorer.questions(parsed, self.retrieval.views, self.retrieval.means)
        if not len(beside) and not any(bool(question.any()) for question in questions.values()):
            _nothing_to_ask(parsed, where)
        return self.scorer.pre_ranked(parsed, self.retrieval, questions, num_candidates, exclude, beside)

    def _answer(self, asked: Read, scores: list[float]) -> dict[str, Any]:
        request, parsed = asked.request, asked.found
        # stable: ties keep the order of retrieval, or the one given
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        if asked.whole_catalogue:
            order = order[: _count(request, "k", DEFAULT_K, MAX_K, "")]
            parsed = replace(parsed, candidates=[parsed.candidates[place] for place in order])
            scores = [scores[place] for place in order]
            order = list(range(len(order)))
        item_ids = self.scorer.item_ids
        items: list[dict[str, Any]] = [
            {"item_id": item_ids[parsed.candidates[place]], "score": scores[place]} for place in order
        ]
        if _flag(request, "with_text", ""):
            for item, place in zip(items, order, strict=True):
                item["text"] = self.text(parsed.candidates[place])
        if _flag(request, "explain", "") and self.explains:
            read = parsed.items[-self.scorer.model.world.data.history_max :]
            weights = self.scorer.explain(parsed)
            for item, place in zip(items, order, strict=True):
                of_views = {view: rows[place] for view, rows in weights.items()}
                item["weights"] = [
                    {"item_id": item_ids[row], **{view: values[n] for view, values in of_views.items()}}
                    for n, row in enumerate(read)
                ]
        return {"items": items, "scores": scores, "model": self.facts}

    def text(self, row: int) -> str:
        """All text of an item, as in the catalogue."""
        return self.read_texts()[row].as_py() or ""

    def read_texts(self) -> pa.ChunkedArray:
        """Those of all items: at the first answer that has some, or before the file goes."""
        if self._texts is None:
            there = "text" in pq.read_schema(self._items_file).names
            self._texts = (
                pq.read_table(self._items_file, columns=["text"])["text"]
                if there
                else pa.chunked_array([[""] * self.num_items])
            )
        return self._texts

    # ---- what a page shows ---------------------------------------------------------------------------------

    @property
    def num_items(self) -> int:
        return len(self.scorer.item_ids)

    @property
    def title(self) -> str:
        """How tables call the model."""
        return self.scorer.model.title

    @property
    def tasks(self) -> tuple[str, ...]:
        """("rec", "src") or the one that it answers."""
        return task_names(self.scorer.model)

    @property
    def explains(self) -> bool:
        """Whether "explain" adds weights: whether the model weighs history items."""
        return type(self.scorer.model).explain is not Ranker.explain

    @property
    def query_mode(self) -> str:
        """How queries are written: natural, words (numbers), digits or drop."""
        return self.scorer.query_format.mode

    def some_users(self, count: int) -> dict[str, Any]:
        """{"users": at most `count` ids whose histories are known, "reason": why there are none}."""
        return {"users": self.users.some(count), "reason": self.users.reason}

    def history_of(self, user_id: Any) -> list[dict[str, Any]]:
        """A user's clicks, oldest first, as in a request, each with its item's text. Raises RequestError."""
        clicks = self.users.history(user_id, self.scorer.item_ids)
        items = self.users.items(user_id).tolist()
        return [{**click, "text": self.text(item)} for click, item in zip(clicks, items, strict=True)]


def _retriever_for(
    scorer: Scorer,
    chosen: str | Path,
    model_dir: Path,
    retrieval: Retrieval | None,
    device: str | None,
    notify: Notify,
) -> Retriever | None:
    tasks = task_names(scorer.model)
    return open_retriever(chosen, model_dir, tasks, scorer.item_ids, retrieval, device, notify)


def _nothing_to_ask(parsed: ParsedRequest, where: str) -> None:
    if parsed.items:
        return  # items without vectors: retrieval finds nothing, which is an answer
    if parsed.query is None:
        raise RequestError(
            f"{where}: history is empty: there is nothing to recommend from. Give at least one item, or "
            "search with a query"
        )
    raise RequestError(
        f"{where}: the model knows no word of the query {parsed.query!r}, and history is empty"
    )


def _names(requests: Sequence[Any]) -> list[str]:
    """What errors call the requests."""
    if len(requests) == 1:
        return ["the request"]
    return [f"request {number}" for number in range(1, len(requests) + 1)]


def refuse_misspelt(request: Mapping[str, Any], where: str) -> None:
    """A request may carry any other field, but not one of ours in another spelling: the whole catalogue would
    be searched instead of "candidate", or an empty history taken for "user". Raises RequestError."""
    for name, value in request.items():
        field = SPELLINGS.get(_letters(name))
        if field is None or name == field or is_absent(value) or not is_absent(request.get(field)):
            continue
        if field == "user_id" and not missing(request.get("history")):
            continue  # the history says it all
        raise RequestError(f"{where}: the field {name!r} is not read: call it {field!r}")


def _letters(name: Any) -> str:
    return str(name).lower().replace("_", "").replace("-", "").removesuffix("s")


def _count(request: Mapping[str, Any], name: str, default: int, largest: int, where: str) -> int:
    value = request.get(name)
    if is_absent(value):
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.integer)
        or (isinstance(value, float) and (not math.isfinite(value) or value != int(value)))
    ):
        raise RequestError(f"{where}: {name} must be a whole number, got {value!r}")
    if not 1 <= value <= largest:
        raise RequestError(f"{where}: {name} must be between 1 and {largest}, got {int(value)}")
    return int(value)


def _flag(request: Mapping[str, Any], name: str, where: str) -> bool:
    value = request.get(name)
    if is_absent(value):
        return False
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{where}: {name} must be true or false, got {value!r}")
    return bool(value)


SPELLINGS = {_letters(name): name for name in FIELDS} | {"user": "user_id"}


def noted_version(folder: Path) -> dict[str, Any]:
    """{"name", "version"} as MLflow notes them beside a version that it has fetched; empty elsewhere."""
    path = folder / "registered_model_meta"
    document = read_yaml(path) if path.is_file() else {}
    if not document.get("model_version"):
        return {}
    return {"name": document["model_name"], "version": int(document["model_version"])}
