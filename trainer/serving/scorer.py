"""Scores of given candidates from a history, without the training data: what a registered model, `gensr
score` and the demo answer with.

A request:  {"user_id"?: …, "history": [{"item_id": …, "task": "rec" | "src"}, … oldest first], "task": "rec"
            | "src",
             "query": text, list of anonymised words, or null, "candidates": [item ids]}
The answer: P("Yes") of each candidate, in the order given. Item ids are the original ones, as text or
numbers. serving/recommend.py answers from the whole catalogue, and takes histories from a prepared folder
where there is one.
"""

import dataclasses
import itertools
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_shards.schema import NO_QUERY, SRC, TASKS, Manifest
from trainer.batch import Batch, ItemTables
from trainer.data.node_cache import local_folder
from trainer.errors import RequestError, RunError
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import load_model, load_run_model
from trainer.runtime.device import autocast, default_device

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from data_shards.text import Words

MAX_CANDIDATES = 2048  # scored at once: bounds memory, whatever a request asks for
TABLE_NAMES = ("cf", "item_tokens", "item_words")


@dataclass(frozen=True)
class QueryFormat:
    """How a query becomes rows of ItemTables.query_*: the settings of the prepared folder that the model was
    trained on."""

    mode: str  # natural, words, digits or drop (data_shards/text.py)
    query_tokens: int
    query_words: int
    lowercase: bool


@dataclass(frozen=True)
class ParsedRequest:
    """Rows instead of ids."""

    items: list[int]  # history, oldest first, all of it; the model reads the newest history_max
    tasks: list[int]
    task: int
    query: str | None
    candidates: list[int]


class Scorer:
    """A model, its item tables and the original ids. Thread-safe.

    precision: the run's, in which a GPU scores, as it does in `gensr evaluate`. A CPU scores in float32: with
    bf16 many take longer.
    """

    def __init__(
        self,
        model: GenSR,
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
        self._row_of = {str(item_id): row for row, item_id in enumerate(item_ids)}
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # queries are rows of the model's tables while a batch is scored

    @classmethod
    def from_run(cls, run_dir: str | Path, device: str | None = None) -> "Scorer":
        """The model of a run folder with the tables of its prepared folder. device: None for a GPU where
        there is one."""
        model, _, config, manifest = load_run_model(run_dir, device or default_device())
        catalog, form = local_folder(config.data) / "catalog", query_format(manifest)
        item_ids = read_item_ids(catalog / "items.parquet")
        return cls(
            model,
            item_ids,
            load_fast_tokenizer(Path(run_dir) / "model"),
            form,
            read_words(catalog / "words.npy", form),
            config.run.precision,
        )

    @classmethod
    def from_artifacts(cls, folder: str | Path, device: str | None = None) -> "Scorer":
        """The same from what a registered version holds: FOLDER/model and FOLDER/items (write_items)."""
        folder = Path(folder)
        facts = read_serving_facts(folder / "items")
        form = QueryFormat(**facts["query_format"])
        model = load_model(folder / "model", read_tables(folder / "items"), device or default_device())
        item_ids, words = (
            read_item_ids(folder / "items" / "items.parquet"),
            read_words(folder / "items" / "words.npy", form),
        )
        return cls(
            model,
            item_ids,
            load_fast_tokenizer(folder / "model"),
            form,
            words,
            facts.get("precision", "fp32"),
        )

    def score(self, request: Mapping[str, Any]) -> list[float]:
        """P("Yes") of each candidate, in the order given. Raises RequestError."""
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
        return scores

    # ---- from requests to rows -----------------------------------------------------------------------------

    def parse(self, request: Mapping[str, Any], where: str, needs_candidates: bool = True) -> ParsedRequest:
        """`where` begins the message of the RequestError that a bad request raises."""
        task = self._task(request.get("task"), where)
        query = request.get("query")
        query = None if _missing(query) else self._query_text(query, where)
        if task == SRC and query is None:
            raise RequestError(
                f"{where}: task is 'src' and query is missing: give text, or a list of word numbers for "
                "anonymised data"
            )
        if task != SRC and query is not None:
            raise RequestError(
                f"{where}: task is 'rec' and a query is given: leave it out, or set task to 'src'"
            )
        history = []
        for entry in _listed(request.get("history"), f"{where}: history"):
            if not isinstance(entry, Mapping) or "item_id" not in entry:
                raise RequestError(
                    f'{where}: history entries look like {{"item_id": …, "task": "rec"}}, got {entry!r}'
                )
            history.append((entry["item_id"], self._task(entry.get("task"), f"{where}: history")))
        candidates = _listed(request.get("candidates"), f"{where}: candidates")
        if needs_candidates and not candidates:
            raise RequestError(f"{where}: candidates is empty: give the item ids to score")
        rows = self._rows([item for item, _ in history], f"{where}: history")
        return ParsedRequest(
            rows, [t for _, t in history], task, query, self._rows(candidates, f"{where}: candidates")
        )

    @staticmethod
    def _task(task: Any, where: str) -> int:
        if not isinstance(task, str) or task not in TASKS:
            raise RequestError(f"{where}: task must be 'rec' or 'src', got {task!r}")
        return TASKS.index(task)

    def _query_text(self, query: Any, where: str) -> str:
        """A query as preparation writes it: text, or anonymised words separated by spaces."""
        if isinstance(query, list | tuple | np.ndarray):
            query = " ".join(str(word) for word in query)
        if not isinstance(query, str):
            raise RequestError(f"{where}: query must be text or a list of word numbers, got {query!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in query):  # no tokenizer takes one
            raise RequestError(f"{where}: query holds half of a surrogate pair, which is not text: {query!r}")
        if self.query_format.mode == "words" and not all(_is_word_number(word) for word in query.split()):
            raise RequestError(
                f"{where}: this model reads queries of anonymised words: a list of word numbers, got "
                f"{query!r}"
            )
        return query

    def _rows(self, item_ids: Sequence[Any], where: str) -> list[int]:
        unknown = [item_id for item_id in item_ids if str(item_id) not in self._row_of]
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise RequestError(
                f"{where}: the model does not know the items {', '.join(map(repr, unknown[:5]))}{more}"
            )
        return [self._row_of[str(item_id)] for item_id in item_ids]

    # ---- from rows to scores -------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self.model.tables.cf.device

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
        batch = self._batch(requests, [candidates for _, candidates in units])
        precision = self.precision if self._device.type == "cuda" else "fp32"
        with (
            self._asking([request.query for request in requests if request.query is not None]),
            autocast(self._device, precision),
        ):
            rows: list[list[float]] = (
                self.model.score(self.model.grouped(batch).to(self._device)).sigmoid().tolist()
            )
        return rows

    def filter_weights(self, parsed: ParsedRequest) -> dict[str, list[list[float]]]:
        """Eq. 5's weights, what the two soft filters read of the history for each candidate: {"cf",
        "semantic"}: [candidates][newest history_max items].

        Each row sums to 1. Empty rows without a history.
        """
        if not parsed.items:
            return {view: [[] for _ in parsed.candidates] for view in ("cf", "semantic")}
        model, batch = self.model, self._batch([parsed], [parsed.candidates]).to(self._device)
        with torch.inference_mode():
            history = model.encode_history(batch)
            cf_BCN = model.cf_filter.weights(
                model.cf_vectors(batch.candidates, batch.fold), history.cf_BNK, history.mask_BN
            )
            semantic = model.semantic_vectors(batch.candidates, model.settings.item_tokens)
            semantic_BCN = model.sem_filter.weights(semantic, history.sem_BND, history.mask_BN)
        return {"cf": cf_BCN[0].tolist(), "semantic": semantic_BCN[0].tolist()}

    def query_vectors(self, queries: Sequence[str]) -> np.ndarray:
        """Queries as one vector each, [Q, D] float32; zero where the model knows no word of a query."""
        with self._asking(queries):
            vectors: Tensor = self.model.query_parts(torch.arange(len(queries), device=self._device))[2]
            return vectors.float().cpu().numpy()

    @contextmanager
    def _asking(self, queries: Sequence[str]) -> Iterator[None]:
        """The model with these queries as rows 0, 1, … of its query tables, for one caller at a time."""
        query_tokens, query_words = self._encode_queries(queries)
        with self._lock, torch.inference_mode():
            tables = dataclasses.replace(
                self.model.tables,
                query_tokens=query_tokens.to(self._device),
                query_words=query_words.to(self._device),
            )
            self.model.set_tables(tables)
            yield

    def _batch(self, requests: Sequence[ParsedRequest], candidates: Sequence[Sequence[int]]) -> Batch:
        """Requests and their candidates; queries are numbered in the order in which they come."""
        newest = self.model.settings.history_max
        items, tasks = (
            [getattr(request, name)[-newest:] for request in requests] for name in ("items", "tasks")
        )
        history, candidate_rows = _padded(items), _padded(candidates)
        query_rows = itertools.count()
        return Batch(
            event_id=torch.arange(len(requests)),
            user=torch.full((len(requests),), -1),
            task=torch.tensor([r.task for r in requests]),
            query=torch.tensor([NO_QUERY if r.query is None else next(query_rows) for r in requests]),
            fold=torch.full((len(requests),), -1),
            history_items=history,
            history_tasks=_padded(tasks),
            history_mask=torch.arange(history.shape[1]) < torch.tensor([len(row) for row in items])[:, None],
            candidates=candidate_rows,
            labels=torch.zeros(candidate_rows.shape),
        )

    def _encode_queries(self, queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As preparation does it → query_tokens [Q, L] and query_words [Q, W], padded with 0; at least one
        row, which recommendations look up."""
        from data_shards.text import encode_texts, split_words

        form, texts = self.query_format, list(queries) or [""]
        if form.mode == "words":
            words = self.words.matrix(*split_words(texts), form.query_words)
            return torch.zeros((len(texts), 1), dtype=torch.int32), torch.from_numpy(words)
        tokens = encode_texts(
            self._tokenizer,
            ["" if form.mode == "drop" else text for text in texts],
            form.query_tokens,
            form.lowercase,
        )
        return torch.from_numpy(tokens), torch.zeros((len(texts), 0), dtype=torch.int32)


def query_format(manifest: Manifest) -> QueryFormat:
    text, settings = manifest.raw["text"], manifest.raw["settings"]
    return QueryFormat(
        text["mode"],
        text["query_tokens"],
        settings.get("query_words", 0),
        bool(settings.get("lowercase", False)),
    )


def read_words(path: Path, form: QueryFormat) -> "Words":
    """The anonymised words of a catalogue, sorted; word id = position + 1."""
    from data_shards.text import Words

    return Words(np.load(path, allow_pickle=False) if form.mode == "words" else np.zeros(0, np.int64))


def load_fast_tokenizer(model_dir: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model_dir / "tokenizer" / "tokenizer.json"))


def write_items(folder: Path, scorer: Scorer, items: pa.Table, facts: Mapping[str, Any]) -> None:
    """What a registered version needs of the prepared folder: item tables (without the cross-fitting folds),
    original ids and texts (the columns item_id and text of `items`), how to read queries, the precision.
    `facts` are kept beside them in serving.json."""
    folder.mkdir(parents=True)
    save_file(
        {name: getattr(scorer.model.tables, name).contiguous().cpu() for name in TABLE_NAMES},
        folder / "tables.safetensors",
    )
    pq.write_table(items.select(["item_id", "text"]), folder / "items.parquet")
    if scorer.query_format.mode == "words":
        np.save(folder / "words.npy", scorer.words.vocabulary)
    document = {
        **facts,
        "precision": scorer.precision,
        "query_format": dataclasses.asdict(scorer.query_format),
    }
    (folder / "serving.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_serving_facts(folder: Path) -> dict[str, Any]:
    """serving.json of what write_items wrote. Raises RunError when FOLDER is something else."""
    path = folder / "serving.json"
    if not path.is_file():
        raise RunError(f"{folder.parent} holds no registered model ({path} is missing)")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def read_tables(folder: Path) -> ItemTables:
    tables = load_file(folder / "tables.safetensors")
    num_items, width = tables["cf"].shape
    no_query = torch.zeros((1, 1), dtype=torch.int32)
    return ItemTables(
        **tables,
        cf_folds=torch.zeros((0, num_items, width)),
        query_tokens=no_query,
        query_words=no_query[:, :0],
    )


def read_item_ids(path: Path) -> list[Any]:
    ids: list[Any] = pq.read_table(path, columns=["item_id"])["item_id"].to_pylist()
    return ids


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of different lengths → [len(rows), longest, at least 1] int64, padded at the end with 0."""
    width = max(1, *(len(row) for row in rows)) if rows else 1
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64).view(
        len(rows), width
    )


def _is_word_number(word: str) -> bool:
    """Digits that int64 holds: Python also counts ² and ٣ among them."""
    return word.isascii() and word.isdigit() and len(word) < 19


def is_absent(value: Any) -> bool:
    """None, or NaN, which is how pandas writes None."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _missing(value: Any) -> bool:
    """Absent, "" and []."""
    return is_absent(value) or (isinstance(value, str | list | tuple | np.ndarray) and len(value) == 0)


def _listed(value: Any, where: str) -> list[Any]:
    if _missing(value):
        return []
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    raise RequestError(f"{where} must be a list, got {value!r}")
