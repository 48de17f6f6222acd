"""RUN EVENTS: how many clicked items retrieval finds in the whole catalogue, by the share of the CF side. One
line a task and share, recall@100 and @400.

A fixed sample of test events; what the user had clicked before is left out, never the clicked item itself.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from data_shards.schema import REC, TASKS
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.data.node_cache import local_folder
from trainer.evaluation.full import clicked_items, place_of
from trainer.runs.weights import load_run_model
from trainer.serving.recommend import run_retrieval
from trainer.serving.users import read_clicks

SHARES, CUTOFFS = (1 - 1e-6, 0.75, 0.5, 0.25, 1e-6), (100, 400)


def main(run_dir: Path, num_events: int) -> None:
    model, config, folder = load_run_model(run_dir)
    folder = local_folder(config.data)
    retrieval, clicks = run_retrieval(run_dir, model), read_clicks(folder, manifest)
    batch = next(
        iter(EvalStream(PreparedFolder.at(folder), "test", config.data, num_events, max_events=num_events))
    )
    with torch.inference_mode():
        queries = model.query_parts(batch.query)[2].numpy()
    clicked = clicked_items(batch)
    for task, name in enumerate(TASKS):
        rows = np.flatnonzero((batch.task == task).numpy())
        for share in SHARES:
            places = []
            for row in rows:
                history = batch.history_items[row][batch.history_mask[row]].tolist()
                seen = np.setdiff1d(clicks.before(int(batch.event_id[row])), [clicked[row]]).tolist()
                found = retrieval.candidates(
                    history, None if task == REC else queries[row], max(CUTOFFS), seen, share
                )
                places.append(place_of(int(clicked[row]), found))
            recalls = "  ".join(f"recall@{k} {np.mean(np.array(places) <= k):.3f}" for k in CUTOFFS)
            print(f"{name}  {len(rows)} events  CF share {share:.2f}  {recalls}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
