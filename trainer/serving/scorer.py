"""Scores of given candidates from a history, without the training data: what a registered model, `gensr
score` and the demo answer with. serving/requests.py says how requests look; serving/recommend.py answers from
the whole catalogue, and takes histories from a prepared folder where there is one.
"""

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_shards.schema import NO_QUERY
from trainer.batch import Batch
from trainer.errors import RunError
from trainer.models.contract import Ranker, View
from trainer.runs.run_folder import RunFolder
from trainer.runs.weights import load_model, load_run_model
from trainer.runtime.device import autocast, default_device
from trainer.serving.artifacts import (
    QueryFormat,
    load_fast_tokenizer,
    query_format,
    read_item_ids,
    read_serving_facts,
    read_tables,
    read_words,
)
from trainer.serving.requests import ParsedRequest, RequestReader
from trainer.serving.retrieval import NO_ROWS, Retrieval

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from data_shards.text import Words

MAX_CANDIDATES = 2048  # scored at once: bounds memory, whatever a request asks for


class Scorer:
    """A model, its item tables and the original ids. Thread-safe.

    precision: the run's, in which a GPU scores, as it does in `gensr evaluate`. A CPU scores in float32: with
    bf16 many take longer.
    """

    def __init__(
        self,
        model: Ranker,
        item_ids: Sequence[Any],
        tokenizer: "Tokenizer",
        query_format: QueryFormat,
        words: "Words",
        precision: str,
    ) -> None:
        self.model = model
        self.precision = precision
        self.query_format = query_format
        self.words = words
        self.item_ids = item_ids
        self.reader = RequestReader(item_ids, query_format.mode, model.tasks)
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # queries are rows of the model's tables while a batch is scored

    @classmethod
    def from_run(cls, run_dir: str | Path, device: str | None = None, data_dir: str | Path = "") -> "Scorer":
        """The model of a run folder with the tables of its prepared folder (data_dir; default: the run's).
        device: None for a GPU where there is one."""
        model, config, folder = load_run_model(run_dir, device or default_device(), data_dir)
        form = query_format(folder.manifest)
        tokenizer = load_fast_tokenizer(RunFolder(run_dir).model)
        words = read_words(folder.catalog / "words.npy", form)
        return cls(model, folder.item_ids(), tokenizer, form, words, config.run.precision)

    @classmethod
    def from_artifacts(cls, folder: str | Path, device: str | None = None) -> "Scorer":
        """The same from what a registered version holds: FOLDER/model and FOLDER/items (write_items)."""
        model_dir, items = Path(folder) / "model", Path(folder) / "items"
        facts = read_serving_facts(items)
        form = QueryFormat(**facts["query_format"])
        model = load_model(model_dir, read_tables(items), device or default_device())
        tokenizer, words = load_fast_tokenizer(model_dir), read_words(items / "words.npy", form)
        item_ids = read_item_ids(items / "items.parquet")
        return cls(model, item_ids, tokenizer, form, words, facts.get("precision", "fp32"))

    def parse(self, request: Mapping[str, Any], where: str, needs_candidates: bool = True) -> ParsedRequest:
        """`where` begins the message of the RequestError that a bad request raises."""
        return self.reader.parse(request, where, needs_candidates)

    def score(self, request: Mapping[str, Any]) -> list[float]:
        """The probability of each candidate, in the order given. Raises RequestError."""
        return self.score_many([request])[0]

    def score_many(self, requests: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        """score() of each request, in batches. Raises RequestError that names the first bad request before
        anything is scored."""
        return self.score_parsed(
            [self.parse(request, f"request {number}") for number, request in enumerate(requests, start=1)]
        )

    def score_parsed(self, parsed: Sequence[ParsedRequest]) -> list[list[float]]:
        """The same for requests that parse() has read."""
        scores: list[list[float]] = [[] for _ in parsed]
        for units in self._batches(parsed):
            for (number, candidates), row in zip(units, self._score_units(parsed, units), strict=True):
                scores[number] += row[: len(candidates)]
        for number, of_request in enumerate(scores, start=1):
            self.refuse_nan(torch.tensor(of_request), f"request {number}")
        return scores

    def score_catalogue(self, parsed: ParsedRequest) -> Tensor:
        """Scores of all items for one request, [num_items] float32 on the CPU: for the order only."""
        with self._asking([parsed], [[]]) as batch:
            scores_I = self.model.score_catalogue(batch)[0].float().cpu()
        self.refuse_nan(scores_I, "the request")
        return scores_I.clone()  # behind inference mode: the caller may change it

    def refuse_nan(self, scores: Tensor, asked: str) -> None:
        """Raises RunError where one of the scores is NaN, which sorting would put first. asked: by whom."""
        if bool(scores.isnan().any()):
            raise RunError(f"{self.model.title} gives NaN as a score for {asked}: it cannot be ranked")

    def explain(self, parsed: ParsedRequest) -> dict[str, list[list[float]]]:
        """What the model reads of the history for each candidate, by view: [candidates][newest history_max
        items]. Each row sums to 1. Empty rows without a history."""
        with self._asking([parsed], [parsed.candidates]) as batch:
            weights = self.model.explain(batch)
            return {
                view: w_BCN[0].tolist() if parsed.items else [[] for _ in parsed.candidates]
                for view, w_BCN in weights.items()
            }

    def questions(
        self, parsed: ParsedRequest, views: Mapping[str, View], means: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What each view's index is asked with for one request, [width] each; zero where it has nothing to
        ask."""
        found = {}
        for whole in {view.whole_history for view in views.values()}:
            longest = max(1, len(parsed.items)) if whole else None
            with self._asking([parsed], [[]], history_max=longest) as batch:
                for name, view in views.items():
                    if view.whole_history == whole:
                        found[name] = view.ask(batch, means[name].to(self.model.device))[0].float().cpu()
        return found

    def pre_ranked(
        self,
        parsed: ParsedRequest,
        retrieval: Retrieval,
        questions: Mapping[str, Tensor],
        num_candidates: int,
        exclude: Sequence[int],
        beside: np.ndarray = NO_ROWS,
    ) -> np.ndarray:
        """Rows of the items that retrieval finds for one request, best first (retrieval.py)."""
        asking = self._asking([parsed], [[]])
        return retrieval.pre_ranked(questions, parsed.task, asking, num_candidates, exclude, beside)

    # ---- from rows to scores -------------------------------------------------------------------------------

    def _batches(self, parsed: Sequence[ParsedRequest]) -> Iterator[list[tuple[int, list[int]]]]:
        """Groups of (request, some of its candidates) that hold at most MAX_CANDIDATES with their padding."""
        units: list[tuple[int, list[int]]] = []
        widest = 0
        for number, request in enumerate(parsed):
            for start in range(0, len(request.candidates), MAX_CANDIDATES):
                candidates = request.candidates[start : start + MAX_CANDIDATES]
                if units and (len(units) + 1) * max(widest, len(candidates)) > MAX_CANDIDATES:
                    yield units
                    units, widest = [], 0
                units.append((number, candidates))
                widest = max(widest, len(candidates))
        if units:
            yield units

    def _score_units(
        self, parsed: Sequence[ParsedRequest], units: Sequence[tuple[int, list[int]]]
    ) -> list[list[float]]:
        requests = [parsed[number] for number, _ in units]
        with self._asking(requests, [candidates for _, candidates in units]) as batch:
            rows: list[list[float]] = self.model.probability(self.model.score(batch)).tolist()
            return rows

    @contextmanager
    def _asking(
        self,
        requests: Sequence[ParsedRequest],
        candidates: Sequence[Sequence[int]],
        history_max: int | None = None,
    ) -> Iterator[Batch]:
        """Requests as a batch on the model's device, with their queries as rows 0, 1, … of its query tables,
        for one caller at a time."""
        queries = Queries()
        batch = self._batch(requests, candidates, queries, history_max or self.model.world.data.history_max)
        tokens, words = self._encode_queries(queries.texts)
        device = self.model.device
        precision = self.precision if device.type == "cuda" else "fp32"
        with self._lock, torch.inference_mode(), autocast(device, precision):
            tables = self.model.tables
            asked = dataclasses.replace(tables, query_tokens=tokens.to(device), query_words=words.to(device))
            self.model.set_tables(asked)
            self.model.set_asked(queries.texts)
            yield self.model.prepare(batch).to(device)

    def _batch(
        self,
        requests: Sequence[ParsedRequest],
        candidates: Sequence[Sequence[int]],
        queries: "Queries",
        history_max: int,
    ) -> Batch:
        items, tasks = ([getattr(r, name)[-history_max:] for r in requests] for name in ("items", "tasks"))
        history, candidate_rows = _padded(items), _padded(candidates)
        asked = torch.tensor([queries.row(request.query) for request in requests])
        return Batch(
            event_id=torch.arange(len(requests)),
            user=torch.tensor([request.user for request in requests]),
            task=torch.tensor([request.task for request in requests]),
            query=asked,
            fold=torch.full((len(requests),), -1),
            history_items=history,
            history_tasks=_padded(tasks),
            history_queries=self._history_queries(requests, queries, history_max, history.shape[1]),
            history_mask=torch.arange(history.shape[1]) < torch.tensor([len(row) for row in items])[:, None],
            candidates=candidate_rows,
            labels=torch.zeros(candidate_rows.shape),
        )

    def _history_queries(
        self, requests: Sequence[ParsedRequest], queries: "Queries", history_max: int, width: int
    ) -> Tensor:
        """Rows of the history's queries, where the model reads them and they are known; else NO_QUERY."""
        if "history_queries" not in self.model.needs:
            return torch.full((len(requests), width), NO_QUERY)
        rows = [[queries.row(text) for text in r.history_queries[-history_max:]] for r in requests]
        return _padded(rows, NO_QUERY, width)

    def _encode_queries(self, queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As preparation does it → query_tokens [Q, L] and query_words [Q, W], padded with 0; at least one
        row, which recommendations look up."""
        from data_shards.text import encode_texts, split_words

        form, texts = self.query_format, list(queries) or [""]
        if form.mode == "words":
            words = self.words.matrix(*split_words(texts), form.query_words)
            return torch.zeros((len(texts), 1), dtype=torch.int32), torch.from_numpy(words)
        asked = ["" if form.mode == "drop" else text for text in texts]
        tokens = encode_texts(self._tokenizer, asked, form.query_tokens, form.lowercase)
        return torch.from_numpy(tokens), torch.zeros((len(texts), 0), dtype=torch.int32)


class Queries:
    """Texts of a batch's queries, numbered in the order in which they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def row(self, text: str | None) -> int:
        if text is None:
            return NO_QUERY
        self.texts.append(text)
        return len(self.texts) - 1


def _padded(rows: Sequence[Sequence[int]], fill: int = 0, width: int = 0) -> Tensor:
    """Rows of different lengths → [len(rows), longest, at least 1] int64, padded at the end."""
    width = max(1, width, *(len(row) for row in rows)) if rows else max(1, width)
    padded = [[*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), width)
