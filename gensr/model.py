"""A trained model that answers requests, from a run folder or from the registry."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from trainer.serving.recommend import Recommender

DEFAULT_K, NUM_CANDIDATES = 10, 400


def load(
    model: str | Path, *, data: str | Path = "", uri: str = "", retriever: str | Path | None = None
) -> "Model":
    """Open a run folder, or `models:/NAME@alias` or `models:/NAME/VERSION` of the MLflow registry.

    data: prepared folder in which users are looked up; default: the one that the model was trained on.
    uri: the registry's address; default: MLFLOW_TRACKING_URI, else runs/mlflow.db.
    retriever: run folder of another model that also finds candidates; "" for none; default: the run's
    serving.retriever, or the version's own.
    Raises GensrError if there is no such model.

    >>> import gensr
    >>> model = gensr.load("runs/mine")
    >>> model.num_items
    150
    """
    from trainer.registry.store import open_model

    return Model(open_model(model, uri, data, retriever=retriever))


class Model:
    """Answers requests; may be shared by threads. Made by `gensr.load`."""

    def __init__(self, recommender: "Recommender") -> None:
        self._recommender = recommender

    @property
    def num_items(self) -> int:
        """Items of the catalogue."""
        return self._recommender.num_items

    @property
    def facts(self) -> dict[str, Any]:
        """Where the model comes from: run, or name and version, and its data."""
        return dict(self._recommender.facts)

    def users(self, count: int = 10) -> list[str]:
        """Some users whose histories are known; empty without the prepared folder.

        >>> len(model.users(3))
        3
        """
        return list(self._recommender.some_users(count)["users"])

    def history(self, user: Any) -> "pd.DataFrame":
        """A user's clicks, oldest first: item_id, task (rec or src), query (of searches), text.

        >>> list(model.history("u3").columns)
        ['item_id', 'task', 'query', 'text']
        """
        import pandas as pd

        return pd.DataFrame(self._recommender.history_of(user), columns=["item_id", "task", "query", "text"])

    def recommend(
        self,
        user: Any = None,
        *,
        history: "pd.DataFrame | Iterable[Any] | None" = None,
        k: int = DEFAULT_K,
        num_candidates: int = NUM_CANDIDATES,
        include_seen: bool = False,
    ) -> "pd.DataFrame":
        """The k best items of the whole catalogue, best first: item_id, score (P(Yes)), text.

        Give a user of the training data, or a history, oldest first: item ids, or a data frame with the
        column item_id and, if known, task and query. num_candidates: how many items retrieval hands to the
        ranking. include_seen: also return items of the history. Raises GensrError for an unknown user or
        item.

        >>> model.recommend(user="u3", k=3).shape
        (3, 3)
        >>> list(model.recommend(history=["i1", "i2"], k=1).columns)
        ['item_id', 'score', 'text']
        """
        return self._ask({"task": "rec"}, user, history, k, num_candidates, include_seen)

    def search(
        self,
        query: str | Sequence[int],
        *,
        user: Any = None,
        history: "pd.DataFrame | Iterable[Any] | None" = None,
        k: int = DEFAULT_K,
        num_candidates: int = NUM_CANDIDATES,
        include_seen: bool = False,
    ) -> "pd.DataFrame":
        """The k best items for a query, and for a user or a history if one is given; see `recommend`.

        query: text; for anonymised data a list of word numbers.

        >>> found = model.search("garden lamp", user="u3", k=5)
        >>> found["score"].is_monotonic_decreasing
        True
        """
        words = isinstance(query, Iterable) and not isinstance(query, str | bytes)
        asked = {"task": "src", "query": list(query) if words else query}
        return self._ask(asked, user, history, k, num_candidates, include_seen)

    def score(self, requests: "pd.DataFrame | Sequence[Mapping[str, Any]]") -> "pd.DataFrame":
        """Scores (P(Yes)) of given items. Two forms, both with user_id or history, and query for a search:

        - one row per pair, with the column item_id: the same frame with the column `score`
        - one row per request, with the column candidates (a list of item ids): the same frame with the column
          `scores`, a list in the order of the candidates

        task is rec or src; without that column, a row with a query is a search. Other columns are kept.
        Raises a GensrError that names the first bad row.

        >>> import pandas as pd
        >>> pairs = pd.DataFrame({"user_id": ["u3", "u3", "u4"], "item_id": ["i1", "i2", "i1"]})
        >>> bool(model.score(pairs)["score"].between(0, 1).all())
        True
        >>> wanted = pd.DataFrame([{"history": ["i1"], "query": "garden lamp", "candidates": ["i5", "i6"]}])
        >>> len(model.score(wanted)["scores"][0])
        2
        """
        import pandas as pd

        from trainer.errors import RequestError

        frame = requests if isinstance(requests, pd.DataFrame) else pd.DataFrame(list(requests))
        values = frame.astype(object).where(frame.notna(), None)  # NaN, NaT and NA are None
        rows = [{str(key): value for key, value in row.items()} for row in values.to_dict("records")]
        if "candidates" in frame:
            asked = [_request(row, number) for number, row in enumerate(rows, start=1)]
            names = [f"row {number}" for number in range(1, len(asked) + 1)]
            return frame.assign(scores=self._recommender.score(asked, names))
        if "item_id" not in frame:
            raise RequestError(
                "score: give a column item_id (one row a pair) or candidates (one row a request); got "
                f"{', '.join(map(str, frame.columns)) or 'no columns'}"
            )
        return frame.assign(score=self._score_pairs(rows))

    def _score_pairs(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Pairs of the same request are ranked together: its history is encoded once."""
        groups: dict[str, dict[str, Any]] = {}
        places: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            request = _request({**row, "candidates": [row["item_id"]]}, number + 1)
            key = repr([request.get(name) for name in ("user_id", "history", "task", "query")])
            groups.setdefault(key, {**request, "candidates": []})["candidates"].append(row["item_id"])
            places.setdefault(key, []).append(number)
        scores = [0.0] * len(rows)
        names = [f"row {numbers[0] + 1}" for numbers in places.values()]  # the first of the request
        answers = self._recommender.score(list(groups.values()), names) if groups else []
        for numbers, answer in zip(places.values(), answers, strict=True):
            for number, value in zip(numbers, answer, strict=True):
                scores[number] = value
        return scores

    def _ask(
        self,
        asked: Mapping[str, Any],
        user: Any,
        history: "pd.DataFrame | Iterable[Any] | None",
        k: int,
        num_candidates: int,
        include_seen: bool,
    ) -> "pd.DataFrame":
        import pandas as pd

        from trainer.errors import RequestError
        from trainer.serving.requests import is_absent

        user = None if is_absent(user) else user
        if user is not None and history is not None:
            raise RequestError("user and history both say whose history it is: give one of them")
        if user is None and history is None and asked["task"] == "rec":
            raise RequestError("whose recommendations? Give user=… or history=[…]")
        whose = {"history": _entries(history)} if user is None else {"user_id": user}
        limits = {"k": k, "num_candidates": num_candidates, "include_seen": include_seen}
        answer = self._recommender.recommend({**asked, **whose, **limits, "with_text": True})
        return pd.DataFrame(answer["items"], columns=["item_id", "score", "text"])


def _request(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A row of a frame as a request: its task follows from the query, history entries from item ids."""
    from trainer.errors import RequestError
    from trainer.serving.recommend import refuse_misspelt
    from trainer.serving.requests import is_absent, missing

    request = dict(row)
    refuse_misspelt(request, f"row {number}")
    if missing(request.get("task")):
        request["task"] = "rec" if missing(request.get("query")) else "src"
    if request["task"] == "rec" and is_absent(request.get("user_id")) and is_absent(request.get("history")):
        raise RequestError(f"row {number}: whose recommendation? Give user_id or history")
    if not missing(request.get("history")):
        request["history"] = _entries(request["history"])
    return request


def _entries(history: Any) -> list[dict[str, Any]]:
    """[{"item_id", "task", "query"?}, …]: from a data frame, from such mappings, or from item ids, which
    count as recommendations."""
    import pandas as pd

    from trainer.errors import RequestError
    from trainer.serving.requests import is_absent

    if history is None:
        return []
    if isinstance(history, str | bytes | Mapping) or not isinstance(history, Iterable):
        raise RequestError(f"history must be a list of item ids or a data frame, got {history!r}")
    rows = history.to_dict("records") if isinstance(history, pd.DataFrame) else list(history)
    entries = [row if isinstance(row, Mapping) else {"item_id": row} for row in rows]
    return [
        {"task": "rec", **{name: value for name, value in entry.items() if not is_absent(value)}}
        for entry in entries
    ]
