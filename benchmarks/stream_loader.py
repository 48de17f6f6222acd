"""OUT SECONDS BATCH: batches from the training stream, as training reads them. Prints examples, CPU and wall
seconds, memory and distinct users as JSON.

rss_bytes is what reading adds to a process that has imported everything: its highest resident memory less
that before the stream was opened.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import psutil
import torch

from data_shards.schema import read_manifest
from trainer.config import DataConfig
from trainer.data import TrainStream, prefetched
from trainer.data.folder import PreparedFolder

HISTORY, NEGATIVES, DISTINCT_BATCHES = 20, 4, 200


def main(folder: Path, seconds: float, batch_size: int) -> None:
    torch.set_num_threads(1)
    process, _manifest = psutil.Process(), read_manifest(folder)
    config = DataConfig(history_max=HISTORY, num_negatives=NEGATIVES)
    before = highest = process.memory_info().rss
    batches = prefetched(TrainStream(PreparedFolder.at(folder), config, 0, batch_size, batch_size))
    next(batches)
    examples, number, cpu, wall = 0, 0, time.process_time(), time.perf_counter()
    while time.process_time() - cpu < seconds:
        examples += next(batches).candidates.numel()
        number += 1
        if number % 64 == 0:
            highest = max(highest, process.memory_info().rss)
    measured = {
        "examples": examples,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
    }
    highest = max(highest, process.memory_info().rss)
    distinct = [len(batch.user.unique()) for batch in itertools.islice(batches, DISTINCT_BATCHES)]
    memory = {"rss_bytes": highest - before, "process_rss_bytes": highest}
    print(
        json.dumps(
            {
                **measured,
                **memory,
                "distinct_users_mean": sum(distinct) / len(distinct),
                "distinct_users_min": min(distinct),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
