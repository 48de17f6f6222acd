"""Directed neighbours: what was clicked soon after this item (a Markov chain with skips; cf. Rendle et al.,
"Factorizing Personalized Markov Chains", WWW 2010, without the factors).

    n(a → b) = Σ decay_step^(k − 1) over the times that a is the k-th click before b, k ≤ steps
    T(a → b) = n(a → b) / √(clicks of a · clicks of b)
    s(u, b)  = Σ_a decay^age(a) · T(a → b)           a over the history, age 0 = the newest

Clicks are those of histories: a search and a recommendation of one item at one time are one click, and only
what is strictly earlier is before b. Each item keeps its nearest followers only. Counted, not trained; an
empty history scores 0 everywhere. Recommendation only.
"""

from typing import Literal

from data_shards import settings as s
from trainer.config import ModelSettings, Positive, Share
from trainer.models.baselines.item_knn import ItemKnn
from trainer.models.layers.neighbours import click_sequences, followers


@s.settings
class TransitionsSettings(ModelSettings):
    name: Literal["transitions"] = "transitions"
    """followers by order of clicks"""
    steps: Positive = 3
    """how far behind an item another still follows it"""
    step_decay: Share = 0.5
    """weight of a follower for each step between"""
    decay: Share = 0.8
    """weight of a history item for each newer one"""
    num_neighbours: Positive = 200
    """followers that each item keeps"""
    clicks: Literal["rec", "all"] = "all"
    """clicks that are counted: of recommendations only, or of searches, too"""


class Transitions(ItemKnn):
    """item-kNN with another, directed, similarity: `neighbours` are followers."""

    Settings = TransitionsSettings  # type: ignore[assignment]
    title = "transitions"
    settings: TransitionsSettings  # type: ignore[assignment]

    def fit(self) -> None:
        sequences = click_sequences(self.world.clicks(), self.settings.clicks)
        settings, num_items = self.settings, self.world.num_items
        row, other, _, share = followers(*sequences, num_items, settings.steps, settings.step_decay)
        self._keep_nearest(row, other, share)


MODEL = Transitions
