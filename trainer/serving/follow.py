"""`gensr serve models:/NAME@alias --follow SECONDS`: when the alias has moved, the version that it names now
is loaded beside the one that answers, asked a question, and put in its place (live.py). One that cannot be
used changes nothing, which the log, /health and /metrics say."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.serving.live import Live
from trainer.serving.recommend import Recommender

RETRY_S = 600.0  # until a version that could not be used is tried again: it may have been the network
log = logging.getLogger("gensr.service")


@dataclass(frozen=True)
class Follow:
    """model: models:/NAME@alias. newest: asks which version that is, 0 for none. open: loads it."""

    model: str
    every_s: float
    newest: Callable[[], int]
    open: Callable[[], Recommender]


class Follower:
    """Looks at the alias every few seconds, in a thread that nothing waits for."""

    def __init__(self, follow: Follow, live: Live) -> None:
        self._follow, self._live = follow, live
        self._ended = threading.Event()
        self._failed, self._failed_at = 0, 0.0  # the newest version that could not be used, and when

    def start(self) -> None:
        threading.Thread(target=self._run, name="gensr-follow", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(self._follow.every_s):
            self.look()

    def look(self) -> None:
        """Once."""
        model = self._follow.model
        try:
            number = self._follow.newest()
        except Exception as error:  # of whatever kind: it is asked again
            return self._tell(f"the registry does not say what {model} is", error)
        if number == number_in(self._live.recommender):
            self._live.problem = ""
        elif not number:
            self._tell(f"there is no {model} any more")
        elif number == self._failed and time.monotonic() - self._failed_at < RETRY_S:
            self._tell(f"version {number} of {model} cannot be used")
        else:
            self._take(number)

    def _take(self, number: int) -> None:
        model, before = self._follow.model, number_in(self._live.recommender)
        try:
            recommender = self._follow.open()
            ask_once(recommender)
            if self._live.recommender.users.are_read:  # else the requests would wait for it
                recommender.users.read()
        except Exception as error:  # a damaged file has errors of every library
            self._failed, self._failed_at = number, time.monotonic()
            self._live.metrics.model_refused()
            return self._tell(f"version {number} of {model} cannot be used", error)
        self._live.replace(recommender)
        # as a warning: where nobody has set logging up, it shows no less
        log.warning("%s: version %d answers, no longer %d", model, number_in(recommender), before)

    def _tell(self, problem: str, error: Exception | None = None) -> None:
        """When it is new, not at every look. The reason may name folders, so it is in the log alone."""
        if problem != self._live.problem:
            self._live.problem = problem
            answers = number_in(self._live.recommender)
            reason = f": {type(error).__name__}: {error}" if error is not None else ""
            log.error("%s; version %d goes on answering%s", problem, answers, reason)


def number_in(recommender: Recommender) -> int:
    return int(recommender.facts["version"])


def ask_once(recommender: Recommender) -> None:
    """A question of each task, to a model that nobody has asked yet. Raises what answering raises."""
    history = [{"item_id": recommender.scorer.item_ids[0], "task": "rec"}]
    asked: list[dict[str, Any]] = [{"task": task, "history": history, "k": 1} for task in recommender.tasks]
    recommender.answer_or_errors([one | ({"query": "1"} if one["task"] == "src" else {}) for one in asked])
