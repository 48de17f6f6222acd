"""OUT SECONDS BATCH: batches made one example at a time, the prompt of each tokenised. The measure for the
training stream (stream_loader.py).

It is how such collators are usually written: a Python loop over examples, negatives by rejection, text to ids
by the tokenizer, padding at the end. The events of one block lie in memory before the clock starts. Prints
examples, CPU and wall seconds as JSON.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer

from data_shards.schema import SRC, read_manifest
from trainer.data import read_blocks
from trainer.models.gensr.prompt import WORDINGS

HISTORY, NEGATIVES = 20, 4
SLOT = "<unk>"  # one token in place of each vector


class Collator:
    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        self.num_items = manifest.num_items
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        self.queries = pq.read_table(folder / "catalog" / "queries.parquet")["text"].to_pylist()
        self.events = next(read_blocks(folder, manifest.shards("train")[0])).to_pylist()

    def example(self, event: dict[str, Any], item: int, label: int) -> dict[str, Any]:
        first, second, third, fourth, last = WORDINGS["paper"][event["task"]]
        prompt = f"{first} {SLOT} {second} {SLOT} {third} {SLOT} {fourth} {SLOT} {last}"
        if event["task"] == SRC:
            prompt += " " + self.queries[event["query"]]
        history = event["history_items"][-HISTORY:]
        return {
            "ids": self.tokenizer.encode(prompt).ids,
            "history": history,
            "item": item,
            "label": label,
            "user": event["user"],
        }

    def batch(self, events: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        examples = []
        for event in events:
            taken = {event["item"], *event["history_items"][-HISTORY:]}
            examples.append(self.example(event, event["item"], 1))
            for _ in range(NEGATIVES):
                item = random.randrange(self.num_items)
                while item in taken:
                    item = random.randrange(self.num_items)
                taken.add(item)
                examples.append(self.example(event, item, 0))
        width = max(len(example["ids"]) for example in examples)
        return {
            "input_ids": torch.tensor(
                [example["ids"] + [0] * (width - len(example["ids"])) for example in examples]
            ),
            "attention_mask": torch.tensor(
                [[1] * len(example["ids"]) + [0] * (width - len(example["ids"])) for example in examples]
            ),
            "history": torch.tensor(
                [example["history"] + [0] * (HISTORY - len(example["history"])) for example in examples]
            ),
            "item": torch.tensor([example["item"] for example in examples]),
            "user": torch.tensor([example["user"] for example in examples]),
            "labels": torch.tensor([example["label"] for example in examples]),
        }


def main(folder: Path, seconds: float, batch_size: int) -> None:
    collator = Collator(folder)
    collator.batch(collator.events[:batch_size])
    examples, cpu, wall = 0, time.process_time(), time.perf_counter()
    while time.process_time() - cpu < seconds:
        events = random.sample(collator.events, min(batch_size, len(collator.events)))
        examples += len(collator.batch(events)["item"])
    print(
        json.dumps(
            {"examples": examples, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
