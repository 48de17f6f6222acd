"""FOLDER RAW: how well the demo's recommendations could be ranked by someone who knows the planted world and
every user's taste and interests, but sees of the rest only the log. The planted optimum
(trainer/evaluation/optimum.py) also sees what a user has in mind: that is in no log, so a model should be
measured against this observer. Prints NDCG@10 of both.

What a user has in mind (the focus: a topic that lasts for some sessions, data_shards/simulate/behaviour.py)
is filtered forward through the user's earlier clicks, as in a hidden Markov model. Searches need no such
guess: their words say the topic.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_shards.simulate import behaviour
from data_shards.simulate.oracle import Oracle, oracle_scores
from data_shards.simulate.world import INTERESTS_CUMULATIVE
from trainer.batch import Batch
from trainer.config import DataConfig
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.evaluation.optimum import optimum_report
from trainer.evaluation.ranking import rank_events
from trainer.evaluation.sampled import BASELINE_BATCH, task_reports

NO_TOPIC = -1
HOUR_MS = 3_600_000


def focus_probabilities(oracle: Oracle) -> np.ndarray:
    """P(focus is topic t | the user's clicks before), of each of oracle.clicks: float64 [n, T]."""
    world, clicks, interests = oracle.world, oracle.clicks, oracle.users.interests
    num_topics = world.num_topics
    everyone = np.diff(np.concatenate([[0.0], world.topic_cumulative]))
    own = np.zeros((len(interests), num_topics))  # share of each long-term topic
    for rank, share in enumerate(np.diff(np.concatenate([[0.0], INTERESTS_CUMULATIVE]))):
        own[np.arange(len(interests)), interests[:, rank]] += share
    fresh = behaviour.FOCUS_IS_INTEREST * own + (1 - behaviour.FOCUS_IS_INTEREST) * everyone
    explored = 1 - behaviour.FEED_FOCUS - behaviour.FEED_INTERESTS
    same = np.eye(num_topics)

    day, hour = np.divmod((clicks.time_ms - behaviour.START_S * 1000) / HOUR_MS, 24)
    slot = day.astype(int) * len(behaviour.SLOT_HOURS)
    slot += np.searchsorted(behaviour.SLOT_HOURS, hour, side="right") - 1
    topic = world.topic_of(clicks.item)
    found = np.empty((len(slot), num_topics))
    order = np.lexsort((clicks.time_ms, clicks.user))
    for rows in np.split(order, np.nonzero(np.diff(clicks.user[order]))[0] + 1):
        user = clicks.user[rows[0]]
        clicked = behaviour.FEED_FOCUS * same + behaviour.FEED_INTERESTS * own[user] + explored * everyone
        clicked *= np.exp(behaviour.CLICK_FOCUS * same + behaviour.CLICK_INTEREST * (own[user] > 0))
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


def main(folder: PreparedFolder, raw: Path) -> None:
    oracle = Oracle(raw, folder.user_ids(), folder.item_ids())
    belief = focus_probabilities(oracle)

    def score(batch: Batch) -> Tensor:
        clicked = batch.candidates.gather(1, batch.labels.argmax(1, keepdim=True))[:, 0].numpy()
        key = oracle.user[batch.user.numpy()] * oracle.world.num_items + oracle.item[clicked]
        row = np.searchsorted(oracle.key, key)
        clicks, items = oracle.clicks.take(row), oracle.item[batch.candidates.numpy()]
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

    data = DataConfig(history_max=folder.manifest.history_max)
    observer = task_reports(rank_events(score, EvalStream(folder, "test", data, BASELINE_BATCH)))
    optimum = optimum_report(folder, raw)
    for task, report in observer.items():
        print(f"{task}  observer {report['ndcg@10']:.3f}  planted optimum {optimum[task]['ndcg@10']:.3f}")


if __name__ == "__main__":
    main(PreparedFolder.at(sys.argv[1]), Path(sys.argv[2]))
