"""FOLDER RAW: how well the demo's recommendations could be ranked without seeing what a user has in mind. The
planted optimum (trainer/evaluation/optimum.py) sees it, but no log says it, so a model should be measured
against one of these two, who know how the planted world works:

    observer  knows every user's taste and interests, every item's style and popularity, and guesses what the
              user has in mind from the clicks before
    reader    estimates all of it from the clicks that a model is trained on

Prints NDCG@10 of both and of the optimum.

What a user has in mind (the focus: a topic that lasts for some sessions, data_shards/simulate/behaviour.py)
is filtered forward through the user's earlier clicks, as in a hidden Markov model. Searches need no such
guess: their words say the topic.

Letters: U users, I items, T topics of the world; D width of the reader's tastes.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards.schema import REC, TASKS
from data_shards.simulate import behaviour
from data_shards.simulate.oracle import Oracle, oracle_scores
from data_shards.simulate.world import INTERESTS_CUMULATIVE, STYLE_DIM
from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.evaluation.optimum import optimum_report
from trainer.evaluation.ranking import ScoreFunction, rank_events
from trainer.evaluation.sampled import BASELINE_BATCH, task_reports

NO_TOPIC = -1
HOUR_MS = 3_600_000
EXPLORED = 1 - behaviour.FEED_FOCUS - behaviour.FEED_INTERESTS  # share of the feed
SHARES = np.diff(np.concatenate([[0.0], INTERESTS_CUMULATIVE]))
# of the reader; the first two were chosen on the validation split
PRIOR = 3.0  # clicks of everyone's topics beside a user's own
L2 = 4.0  # of tastes and styles, for each clicked item or user
EPOCHS, BATCH, LR = 20, 2048, 0.05
OTHER_TOPIC = -8.0  # log-odds of a result that is not of the query's topic


def everyone(oracle: Oracle) -> np.ndarray:
    """Share of each topic over all users, [T]."""
    return np.diff(np.concatenate([[0.0], oracle.world.topic_cumulative]))


def planted_interests(oracle: Oracle) -> np.ndarray:
    """Share of each long-term topic, [U, T]."""
    interests = oracle.users.interests
    own = np.zeros((len(interests), oracle.world.num_topics))
    for rank, share in enumerate(SHARES):
        own[np.arange(len(interests)), interests[:, rank]] += share
    return own


def counted_interests(oracle: Oracle, known: np.ndarray) -> np.ndarray:
    """The same from the clicks that are known: bool [n]."""
    own = np.zeros((oracle.world.num_users, oracle.world.num_topics)) + PRIOR * everyone(oracle)
    np.add.at(own, (oracle.clicks.user[known], oracle.world.topic_of(oracle.clicks.item[known])), 1.0)
    return np.asarray(own / own.sum(1, keepdims=True))


def liked(own: np.ndarray) -> np.ndarray:
    """What an interest adds to the logit of a click. A counted interest that is smaller than any planted one
    adds less."""
    return np.asarray(behaviour.CLICK_INTEREST * np.minimum(1.0, own / SHARES.min()))


def focus_probabilities(oracle: Oracle, own: np.ndarray) -> np.ndarray:
    """P(focus is topic t | the user's clicks before), of each of oracle.clicks: float64 [n, T]. own: the
    users' interests [U, T]."""
    world, clicks, of_all = oracle.world, oracle.clicks, everyone(oracle)
    fresh = behaviour.FOCUS_IS_INTEREST * own + (1 - behaviour.FOCUS_IS_INTEREST) * of_all
    same = np.eye(world.num_topics)
    likes = liked(own)

    day, hour = np.divmod((clicks.time_ms - behaviour.START_S * 1000) / HOUR_MS, 24)
    slot = day.astype(int) * len(behaviour.SLOT_HOURS)
    slot += np.searchsorted(behaviour.SLOT_HOURS, hour, side="right") - 1
    topic = world.topic_of(clicks.item)
    found = np.empty((len(slot), world.num_topics))
    order = np.lexsort((clicks.time_ms, clicks.user))
    for rows in np.split(order, np.nonzero(np.diff(clicks.user[order]))[0] + 1):
        user = clicks.user[rows[0]]
        clicked = behaviour.FEED_FOCUS * same + behaviour.FEED_INTERESTS * own[user] + EXPLORED * of_all
        clicked *= np.exp(behaviour.CLICK_FOCUS * same + likes[user])
        clicked /= clicked.sum(axis=1, keepdims=True)  # [focus, topic of a click in the feed]
        searched = behaviour.SEARCH_RELATED * same + (1 - behaviour.SEARCH_RELATED) * own[user]
        belief, now = fresh[user], slot[rows[0]]
        for moment in np.split(rows, np.nonzero(np.diff(clicks.time_ms[rows]))[0] + 1):
            kept = behaviour.FOCUS_KEPT ** (slot[moment[0]] - now)
            belief, now = kept * belief + (1 - kept) * fresh[user], slot[moment[0]]
            found[moment] = belief  # clicks of one moment do not know one another, as in a history
            if clicks.search[moment[0]]:  # one search, however many of its results are clicked
                belief = belief * searched[:, clicks.focus[moment[0]]]
            for row in moment[~clicks.search[moment]]:
                belief = belief * clicked[:, topic[row]]
                belief = belief / belief.sum()
            belief = belief / belief.sum()
    return found


# ---- the observer ------------------------------------------------------------------------------------------


def observer(oracle: Oracle) -> ScoreFunction:
    belief = focus_probabilities(oracle, planted_interests(oracle))

    def score(batch: Batch) -> Tensor:
        row, items = clicks_of(oracle, batch), oracle.item[batch.candidates.numpy()]
        clicks = oracle.clicks.take(row)
        flat = clicks.take(np.repeat(np.arange(len(row)), items.shape[1]))  # a row each candidate
        topic = oracle.world.topic_of(items)

        def given(focus: np.ndarray) -> np.ndarray:
            scores = oracle_scores(
                oracle.world, oracle.users, replace(flat, focus=focus), items.reshape(-1, 1)
            )
            return scores.reshape(items.shape)

        sure = np.take_along_axis(belief[row], topic, axis=1)
        with np.errstate(divide="ignore"):  # log 0 = -inf: that case has no weight
            on = np.log(sure) + given(topic.reshape(-1))
            off = np.log1p(-sure) + given(np.full(topic.size, NO_TOPIC))
        known = oracle_scores(oracle.world, oracle.users, clicks, items)
        return torch.from_numpy(np.where(clicks.search[:, None], known, np.logaddexp(on, off)))

    return score


def clicks_of(oracle: Oracle, batch: Batch) -> np.ndarray:
    """The row of oracle.clicks that each event of a batch is."""
    key = oracle.user[batch.user.numpy()] * oracle.world.num_items + oracle.item[batch.clicked.numpy()]
    return np.searchsorted(oracle.key, key)


# ---- the reader --------------------------------------------------------------------------------------------


def reader(oracle: Oracle, until_ms: int) -> ScoreFunction:
    """until_ms: the last training click. Of recommendations: what a topic adds, the item's popularity in it,
    and a product of a taste and a style that are fitted beside both."""
    world, clicks = oracle.world, oracle.clicks
    here_U, here_I = np.zeros(world.num_users, bool), np.zeros(world.num_items, bool)
    here_U[oracle.user], here_I[oracle.item] = True, True
    known = (clicks.time_ms <= until_ms) & here_U[clicks.user] & here_I[clicks.item]
    own = counted_interests(oracle, known)
    belief, likes = focus_probabilities(oracle, own), liked(own)
    rest = behaviour.FEED_INTERESTS * own + EXPLORED * everyone(oracle)
    topic_I = world.topic_of(np.arange(world.num_items))
    clicks_I = np.bincount(clicks.item[known], minlength=world.num_items) + 1.0
    popularity_I = np.log(clicks_I / np.bincount(topic_I, weights=clicks_I)[topic_I])

    def of_topics(row: np.ndarray) -> np.ndarray:
        """log P(a recommended click is of topic t), up to a constant: [n, T]."""
        focus, others = belief[row], rest[clicks.user[row]]
        on = focus * (behaviour.FEED_FOCUS + others) * np.exp(behaviour.CLICK_FOCUS)
        return np.log(on + (1 - focus) * others) + likes[clicks.user[row]]

    beside_UI = fitted(oracle, known, here_I, of_topics, topic_I, popularity_I)

    def score(batch: Batch) -> Tensor:
        user, items = oracle.user[batch.user.numpy()], oracle.item[batch.candidates.numpy()]
        by_topic = np.take_along_axis(of_topics(clicks_of(oracle, batch)), topic_I[items], axis=1)
        beside = np.take_along_axis(beside_UI[user], items, axis=1)
        return torch.from_numpy(by_topic + popularity_I[items] + beside)

    return score


def fitted(
    oracle: Oracle,
    known: np.ndarray,
    here_I: np.ndarray,
    of_topics: Callable[[np.ndarray], np.ndarray],
    topic_I: np.ndarray,
    popularity_I: np.ndarray,
) -> np.ndarray:
    """taste_u · style_i + bias_i [U, I]: a softmax over the items for each known click, beside what topic and
    popularity say. Of a search, the topic is known."""
    clicks, world = oracle.clicks, oracle.world
    row = np.nonzero(known)[0]
    searched = np.where(np.eye(world.num_topics)[clicks.focus[row]] > 0, 0.0, OTHER_TOPIC)
    by_topic = torch.from_numpy(np.where(clicks.search[row][:, None], searched, of_topics(row))).float()
    user, item = torch.from_numpy(clicks.user[row]), torch.from_numpy(clicks.item[row])
    topic, popularity = torch.from_numpy(topic_I), torch.from_numpy(popularity_I).float()
    generator = torch.Generator().manual_seed(0)
    sizes = ((world.num_users, STYLE_DIM), (world.num_items, STYLE_DIM))
    taste, style = ((0.1 * torch.randn(size, generator=generator)).requires_grad_() for size in sizes)
    bias = torch.zeros(world.num_items, requires_grad=True)
    optimizer = torch.optim.Adam([taste, style, bias], lr=LR)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(row), generator=generator).split(BATCH):
            logits = by_topic[chosen][:, topic] + popularity + bias + taste[user[chosen]] @ style.T
            logits = logits.masked_fill(~torch.from_numpy(here_I), -torch.inf)
            size = taste.square().sum() + style.square().sum() + 4 * bias.square().sum()
            loss = F.cross_entropy(logits, item[chosen]) + L2 / (2 * len(row)) * size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (taste @ style.T + bias).detach().numpy()


def main(folder: PreparedFolder, raw: Path) -> None:
    oracle = Oracle(raw, folder.user_ids(), folder.item_ids())
    data = DataConfig(history_max=folder.manifest.history_max)
    until_ms = int(folder.clicks().time.max())
    optimum, recommendation = optimum_report(folder, raw), TASKS[REC]
    for name, score in (("reader", reader(oracle, until_ms)), ("observer", observer(oracle))):
        reports = task_reports(
            rank_events(score, EvalStream(folder, "test", data, BASELINE_BATCH, tasks=(REC,)))
        )
        print(f"{name:<17}{reports[recommendation]['ndcg@10']:.3f}")
    print(f"planted optimum  {optimum[recommendation]['ndcg@10']:.3f}")


if __name__ == "__main__":
    main(PreparedFolder.at(sys.argv[1]), Path(sys.argv[2]))
