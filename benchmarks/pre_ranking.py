"""[--items N --neighbours M --candidates C --events N --threads N]: what pre-ranking adds to one request at
the size of KuaiSAR's catalogue (trainer/models/gensr/views.py).

Tables mean nothing: random CF vectors, neighbours, categories and 16 words an item. Prints milliseconds of
the proposals and of ordering them together with what two indexes found, and the memory of the model's tables.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from data_shards.schema import REC, SRC
from trainer.batch import Batch, ItemTables
from trainer.config import DataConfig
from trainer.models.contract import World
from trainer.models.gensr.evidence import text_key
from trainer.models.gensr.model import GenSR
from trainer.models.gensr.settings import GenSRSettings

WIDTH, WORDS, NUM_WORDS, QUERIES, CATEGORIES, HISTORY = 64, 16, 50_000, 1000, 500, 20


def make_model(num_items: int, num_neighbours: int) -> GenSR:
    draw = torch.Generator().manual_seed(0)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=draw, dtype=torch.int32)

    nothing = torch.zeros(0)
    tables = ItemTables(
        cf=torch.randn(num_items, WIDTH, generator=draw),
        cf_folds=torch.zeros(0, num_items, WIDTH),
        item_tokens=torch.zeros(num_items, 1, dtype=torch.int32),
        item_words=whole(NUM_WORDS, num_items, WORDS),
        item_category=whole(CATEGORIES, num_items, 1) + 1,
        query_tokens=whole(1000, QUERIES, 3) + 1,
        query_words=whole(NUM_WORDS, QUERIES, 3) + 1,
        cf_users=nothing.view(0, WIDTH),
    )
    world = World(
        num_users=1,
        num_items=num_items,
        num_queries=QUERIES,
        num_words=NUM_WORDS,
        vocab_size=1,
        num_categories=CATEGORIES,
        data=DataConfig(history_max=HISTORY),
        tables=tables,
        tokenizer=None,
        clicks=lambda: (_ for _ in ()).throw(AssertionError("not counted here")),
        texts=lambda: ([], []),
    )
    settings = GenSRSettings(backbone="scratch:nano", evidence=True, num_neighbours=num_neighbours)
    model = GenSR(settings, world).eval()
    evidence = model.evidence
    assert evidence is not None
    for start in range(0, num_items, 2**20):  # rows of neighbours are sorted
        rows = whole(num_items, min(2**20, num_items - start), num_neighbours).sort(1).values
        evidence.near[start : start + len(rows)] = rows
        evidence.follow[start : start + len(rows)] = rows.flip(0)
    for table in (evidence.near_users, evidence.follow_weight):
        table.fill_(2.0)
    evidence.users.copy_(whole(1000, num_items).float())
    evidence.clicks.copy_(evidence.users)
    evidence.idf.uniform_(1.0, 12.0, generator=draw)
    evidence.category_key[1:] = text_key(tables.query_tokens[:CATEGORIES].long())
    return model


def make_event(rng: np.random.Generator, num_items: int, task: int) -> Batch:
    history = torch.from_numpy(rng.integers(num_items, size=(1, HISTORY)))
    query = int(rng.integers(CATEGORIES)) if task == SRC else -1
    none = torch.full((1,), -1)
    return Batch(
        event_id=torch.zeros(1, dtype=torch.int64),
        user=none,
        task=torch.tensor([task]),
        query=torch.tensor([query]),
        fold=none,
        history_items=history,
        history_tasks=torch.zeros_like(history),
        history_queries=torch.full_like(history, -1),
        history_mask=torch.ones_like(history, dtype=torch.bool),
        candidates=history[:, :1],
        labels=torch.zeros(1, 1),
    )


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}_ms": round(float(np.percentile(seconds, p)) * 1e3, 2) for p in (50, 95)}


def timed(call: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, float]:
    started = time.perf_counter()
    return call(batch), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("items", 6_890_707),
        ("neighbours", 20),
        ("candidates", 400),
        ("events", 200),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = psutil.Process().memory_info().rss
    model = make_model(options.items, options.neighbours)
    document: dict[str, Any] = {"rss_bytes": psutil.Process().memory_info().rss - before}
    rng = np.random.default_rng(1)
    with torch.inference_mode():
        pre_ranking = model.pre_ranking()
        assert pre_ranking is not None
        for task, name in ((REC, "rec"), (SRC, "src")):
            proposing, ordering, sizes = [], [], []
            for _ in range(options.events):
                event = make_event(rng, options.items, task)
                proposed, seconds = timed(pre_ranking.propose, event)
                proposing.append(seconds)
                of_views = torch.from_numpy(rng.integers(options.items, size=2 * options.candidates))
                rows = torch.cat([proposed[0][proposed[0] < options.items], of_views]).unique()
                asked = replace(event, candidates=rows[None], labels=torch.zeros(1, len(rows)))
                ordering.append(timed(pre_ranking.score, asked)[1])
                sizes.append(len(rows))
            both = [a + b for a, b in zip(proposing, ordering, strict=True)]
            document[name] = {
                "items_ordered": round(float(np.mean(sizes))),
                "propose": percentiles(proposing),
                "order": percentiles(ordering),
                "both": percentiles(both),
            }
    print(json.dumps({"options": vars(options), **document}))


if __name__ == "__main__":
    main()
