"""RUN EVENTS: how many clicked items retrieval finds in the whole catalogue, by the share of the CF side. One
line a task and share, recall@100 and @400.

A fixed sample of test events; what the user had clicked before is left out, never the clicked item itself.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_shards.schema import TASKS
from trainer.config import DataConfig
from trainer.data import EvalStream
from trainer.evaluation.full import place_of, retrieved
from trainer.runs.weights import load_run_model
from trainer.serving.retrieval import run_retrieval
from trainer.serving.users import read_clicks

SHARES, CUTOFFS = (1 - 1e-6, 0.75, 0.5, 0.25, 1e-6), (100, 400)


def main(run_dir: Path, num_events: int) -> None:
    model, config, folder = load_run_model(run_dir)
    retrieval, clicks = run_retrieval(run_dir, model), read_clicks(folder)
    assert retrieval is not None, "a model with views"
    stream = EvalStream(folder, "test", config.data, num_events, max_events=num_events)
    batch = next(iter(stream))
    whole = next(iter(stream.read_as(DataConfig(history_max=folder.manifest.history_max))))
    clicked = batch.clicked.numpy()
    for task, name in enumerate(TASKS):
        mine = batch.take(batch.task == task)
        for share in SHARES:
            shares = {"cf": {task: share}, "semantic": {task: 1 - share}}
            views = {view: replace(v, share=shares[view]) for view, v in retrieval.views.items()}
            by_shares = replace(retrieval, views=views, pre_ranking=None)
            lists = retrieved(
                model,
                by_shares,
                mine,
                whole=whole.take(batch.task == task),
                clicked=mine.clicked.numpy(),
                clicks=clicks,
            )
            places = [place_of(int(item), found) for item, found in zip(mine.clicked, lists, strict=True)]
            recalls = "  ".join(f"recall@{k} {np.mean(np.array(places) <= k):.3f}" for k in CUTOFFS)
            print(f"{name}  {mine.num_events} events of {len(clicked)}  CF share {share:.2f}  {recalls}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
