"""The model that a service answers with at present, and what it says of it. Another version may take its
place while requests come (follow.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.runs.retriever_facts import RETRIEVER
from trainer.serving.metrics import Metrics
from trainer.serving.recommend import Recommender
from trainer.serving.systems import System, Systems, system_of

NAMES = ("name", "version", "run")  # of the facts, those that say which model it is


class Live:
    """replace() may come from another thread at any time: whoever reads two things of the model takes
    `recommender` once.

    problem: why a newer version does not answer, in words for everybody; "" where there is none.
    """

    def __init__(self, recommender: Recommender, others: Sequence[System] = ()) -> None:
        self.recommender, self.problem = recommender, ""
        self.systems = Systems([system_of(recommender), *others])
        self.metrics = Metrics(self.facts)

    @property
    def facts(self) -> dict[str, Any]:
        return public(self.recommender.facts)

    @property
    def names(self) -> dict[str, Any]:
        """Which model it is."""
        return {name: value for name, value in self.facts.items() if name in NAMES}

    def replace(self, recommender: Recommender) -> None:
        """From the next batch on. The one in work ends with the model that it began with."""
        self.recommender, self.problem = recommender, ""
        self.systems.replace(system_of(recommender))
        self.metrics.model_replaced(self.facts)


def public(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What clients read of the model: run folders by their names, not by their places."""
    return {name: Path(value).name if name in ("run", RETRIEVER) else value for name, value in facts.items()}
