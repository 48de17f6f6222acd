"""The systems that one service answers with: its model, and those to compare it with. A request names one
("system"), or leaves it out for the model.

To compare with: another model, and what is counted from the model's prepared folder (popularity, item-kNN,
BM25), which is counted at its first request.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

from data_shards.schema import TASKS
from trainer.errors import RequestError
from trainer.models.zoo import model_class
from trainer.runs.weights import counted_model
from trainer.serving.artifacts import load_fast_tokenizer, query_format, read_words
from trainer.serving.recommend import Recommender
from trainer.serving.scorer import Scorer
from trainer.serving.users import Users

COUNTED = ("popularity", "item_knn", "bm25")
MAIN = ""  # what a request without "system" names


class Answers(Protocol):
    """A Recommender, as far as a service asks it for answers."""

    def answer_or_errors(
        self, requests: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any] | RequestError]: ...


@dataclass(frozen=True)
class System:
    """tasks: "rec", "src". explains: whether answers can have weights. knows_users: whether a request may
    name a user instead of a history. open: called once, at the first request."""

    name: str
    title: str
    tasks: tuple[str, ...]
    explains: bool
    knows_users: bool
    open: Callable[[], Answers]

    @property
    def facts(self) -> dict[str, Any]:
        """What clients read of it."""
        return {
            "name": self.name,
            "title": self.title,
            "tasks": list(self.tasks),
            "explains": self.explains,
            "knows_users": self.knows_users,
        }


class Systems:
    """Answers requests to several systems. For one thread, but for replace()."""

    def __init__(self, systems: Sequence[System]) -> None:
        self.systems = {system.name: system for system in systems}
        self._opened: dict[str, Answers] = {}

    def answer_or_errors(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | RequestError]:
        """Those to one system together; an error stands in the place of a bad one, and of each to a system
        that is not there."""
        answers: dict[int, dict[str, Any] | RequestError] = {}
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(str(request.get("system", MAIN)), []).append(place)
        for name, of_system in places.items():
            asked = [
                {key: value for key, value in requests[place].items() if key != "system"}
                for place in of_system
            ]
            try:
                answers |= zip(of_system, self._open(name).answer_or_errors(asked), strict=True)
            except RequestError as error:
                answers |= dict.fromkeys(of_system, error)
        return [answers[place] for place in range(len(requests))]

    def _open(self, name: str) -> Answers:
        if name not in self.systems:
            there = ", ".join(filter(None, self.systems)) or "no other"
            raise RequestError(f"system: there is no {name!r} here. Leave it out for the model, or: {there}")
        if name not in self._opened:
            self._opened.setdefault(name, self.systems[name].open())  # replace() may have come between
        return self._opened[name]

    def replace(self, system: System) -> None:
        """Another one of that name, from the next call on. May come from another thread."""
        self.systems[system.name] = system
        self._opened[system.name] = system.open()


def system_of(recommender: Recommender, name: str = MAIN) -> System:
    """An opened model. Named, its title has the name, too: two of a kind are to be told apart."""
    return System(
        name=name,
        title=f"{recommender.title}, {name}" if name else recommender.title,
        tasks=recommender.tasks,
        explains=recommender.explains,
        knows_users=not recommender.users.reason,
        open=lambda: recommender,
    )


def compared_systems(models: Sequence[tuple[str, Recommender]], users: Users | None) -> list[System]:
    """Opened models by what the user called them, then what is counted from the folder of `users`, if it is
    there and wanted. A name holds no folder of this machine, and names differ."""
    if users is not None and users.reason:
        users = None
    names: list[str] = list(COUNTED) if users is not None else []
    named = []
    for given, recommender in models:
        is_version = given.startswith("models:/")
        short = given.removeprefix("models:/") if is_version else Path(given).resolve().name
        numbered = chain([short], (f"{short} ({number})" for number in count(2)))
        name = next(one for one in numbered if one not in names)
        names.append(name)
        named.append(system_of(recommender, name))
    return [*named, *_counted_systems(users)] if users is not None else named


def _counted_systems(users: Users) -> Iterator[System]:
    for name in COUNTED:
        with contextlib.suppress(ImportError):  # an install for serving lacks what some are counted with
            kind = model_class(name)
            tasks = tuple(TASKS[task] for task in kind.tasks)
            yield System(name, kind.title, tasks, False, True, partial(counted, name, users))


def counted(name: str, users: Users) -> Recommender:
    """A model that is counted, not trained, in front of a prepared folder."""
    folder, form = users.folder, query_format(users.folder.manifest)
    model = counted_model(name, {}, folder)
    words = read_words(folder.catalog / "words.npy", form)
    tokenizer = load_fast_tokenizer(folder.tokenizer.parent)
    scorer = Scorer(model, folder.item_ids(), tokenizer, form, words, "fp32")
    facts = {"name": name, "manifest_hash": folder.manifest.hash}
    return Recommender(scorer, None, facts, folder.catalog / "items.parquet", users)
