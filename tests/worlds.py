"""Tiny synthetic logs for tests, written as the files that `gensr prepare tables` reads. Everything follows
from the arguments."""

import json
from pathlib import Path
from typing import Any

import numpy as np

TOPICS = ("garden", "kitchen", "music", "travel", "sports", "painting", "science", "cooking")
KINDS = ("lamp", "book", "glove", "tripod", "bottle", "ladder", "speaker", "jacket", "brush", "camera")
DAY_MS = 86_400_000
START_MS = 1_700_000_000_000 - 1_700_000_000_000 % DAY_MS  # a midnight (UTC)


def write_tables(
    folder: Path,
    users: int = 60,
    items: int = 150,
    days: int = 8,
    clicks_a_day: int = 3,
    seed: int = 0,
    anonymised: bool = False,
) -> Path:
    """events.jsonl and items.jsonl in `folder` (created): users like one topic, search for it, and see items
    they do not click.

    anonymised: captions and queries are lists of integers instead of words. Ids are strings ("u3", "i17").
    Returns the folder.
    """
    rng = np.random.default_rng(seed)
    topic_of_item, kind_of_item = rng.integers(len(TOPICS), size=items), rng.integers(len(KINDS), size=items)
    topic_of_user = rng.integers(len(TOPICS), size=users)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "items.jsonl", "w") as file:
        for item in range(items):
            row: dict[str, Any] = {
                "item_id": f"i{item}",
                "text": TOPICS[topic_of_item[item]],
                "category": TOPICS[topic_of_item[item]],
            }
            if anonymised:
                row["words"] = _numbers(topic_of_item[item], kind_of_item[item])
            else:
                row["text"] = f"{row['text']} {KINDS[kind_of_item[item]]} number {item}"
            file.write(json.dumps(row) + "\n")
    with open(folder / "events.jsonl", "w") as file:
        for user in range(users):
            for day in range(days):
                moments = np.sort(rng.choice(DAY_MS, size=clicks_a_day, replace=False))
                for moment in START_MS + day * DAY_MS + moments:
                    liked = np.flatnonzero(topic_of_item == topic_of_user[user])
                    item = (
                        int(rng.choice(liked))
                        if len(liked) and rng.random() < 0.8
                        else int(rng.integers(items))
                    )
                    search = rng.random() < 0.4
                    names = (topic_of_item[item], kind_of_item[item])
                    query = (
                        (_numbers(*names) if anonymised else f"{TOPICS[names[0]]} {KINDS[names[1]]}")
                        if search
                        else None
                    )
                    event = {
                        "user_id": f"u{user}",
                        "item_id": f"i{item}",
                        "time": int(moment),
                        "task": "src" if search else "rec",
                        "query": query,
                    }
                    file.write(json.dumps({**event, "clicked": 1}) + "\n")
                    for other in rng.integers(items, size=3):
                        if other != item:
                            file.write(json.dumps({**event, "item_id": f"i{other}", "clicked": 0}) + "\n")
    return folder


def _numbers(topic: int, kind: int) -> list[int]:
    return [1000 + int(topic), 2000 + int(kind)]
