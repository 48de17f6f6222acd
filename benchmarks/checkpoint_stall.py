"""How long a checkpoint stops training: written beside it (CheckpointWriter.start) against waiting for the
disk (start and finish).

    python benchmarks/checkpoint_stall.py FOLDER [--millions 30] [--repeat 3]

One process, no DeepSpeed, AdamW: 12 bytes a parameter. Prints seconds and their ratio.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from trainer.runs.checkpoint import Progress
from trainer.runs.checkpoint_writer import CheckpointWriter

WIDTH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--millions", type=int, default=30, help="parameters")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    module = torch.nn.Sequential(
        *(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(arguments.millions))
    )
    model, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters(), fused=True))
    accelerator.backward(model(torch.ones(1, WIDTH)).sum())
    optimizer.step()
    run_dir = arguments.folder / "checkpoint_stall"
    writer = CheckpointWriter(accelerator, model, optimizer, run_dir, keep=1)
    beside: list[float] = []
    waiting: list[float] = []
    for number in range(arguments.repeat):
        for stalls, at_once in ((beside, False), (waiting, True)):
            started_s = time.perf_counter()
            writer.start(Progress(step=2 * number + at_once + 1), {}, "")
            if at_once:
                writer.finish()
            stalls.append(time.perf_counter() - started_s)
            writer.finish()
    shutil.rmtree(run_dir)
    one, other = statistics.median(beside), statistics.median(waiting)
    size_gb = 12 * arguments.millions / 1000
    print(
        f"{size_gb:.2f} GB: {one:.2f} s beside training, {other:.2f} s waiting for the disk, ratio "
        f"{other / one:.1f}"
    )


if __name__ == "__main__":
    main()
