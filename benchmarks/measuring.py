"""What gensr_steps.py and reference.py share: the folder they read and the clock."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from trainer.batch import Batch, ItemTables
from trainer.config import Config
from trainer.configs import load_config
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.models.backbones.language import answer_tokens
from trainer.models.gensr.model import GenSR
from trainer.runs.world import load_tokenizer
from trainer.runtime.device import default_device, has_gpu, wait_for
from trainer.runtime.memory import peak_memory_bytes


def open_folder(
    request: dict[str, Any], device: str | None = None
) -> tuple[Config, PreparedFolder, ItemTables, tuple[int, int], str]:
    """Configuration, folder, item tables on the device (None: a GPU where there is one), ids of Yes and No,
    device."""
    torch.manual_seed(0)
    device = device or default_device()
    config = load_config(request["preset"], request["overrides"])
    folder = PreparedFolder.at(request["folder"])
    tables = folder.tables(GenSR.needs).to(device)
    return config, folder, tables, answer_tokens(load_tokenizer(folder.tokenizer)), device


def forget_building() -> None:
    """A GPU's peak of memory counts from here on: what building alone needed (weights in float32 before they
    are cast) is no part of a step."""
    if has_gpu():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def scored_events(request: dict[str, Any], folder: PreparedFolder, config: Config) -> Iterator[Batch]:
    """Test events with their candidates, at most request["pairs"] pairs at once."""
    num_candidates = min(request["pairs"], 1 + folder.manifest.num_negatives)
    for batch in EvalStream(folder, "test", config.data, request["pairs"] // num_candidates):
        yield batch.with_candidates(batch.candidates[:, :num_candidates], batch.labels[:, :num_candidates])


class Meter:
    """Seconds of the steps after `warmup` ones, and of their parts if `laps`: on a GPU each lap waits for the
    device, which steps by themselves do not."""

    def __init__(self, device: str, warmup: int, laps: bool = True) -> None:
        self.device, self.warmup, self.laps = device, warmup, laps
        self.examples, self.wall_s, self.cpu_s, self.num_steps = 0, 0.0, 0.0, 0
        self._started = (0.0, 0.0)
        self.parts: dict[str, float] = {}
        self._last = 0.0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        if self.num_steps == self.warmup:
            wait_for(self.device)
            self.parts.clear()
            self._started = time.perf_counter(), time.process_time()
        self._last = time.perf_counter()
        yield
        self.num_steps += 1

    def count(self, examples: int) -> None:
        """The step takes this many."""
        self.examples += examples if self.num_steps >= self.warmup else 0

    def stop(self) -> None:
        """After the last step."""
        wait_for(self.device)
        self.wall_s = time.perf_counter() - self._started[0]
        self.cpu_s = time.process_time() - self._started[1]

    def lap(self, part: str) -> None:
        """What has happened since the last lap was `part`."""
        if not self.laps:
            return
        wait_for(self.device)
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now

    def report(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
            "peak_memory_bytes": peak_memory_bytes(),
            "parts_s": self.parts,
            "device": "cpu" if self.device == "cpu" else torch.cuda.get_device_name(),
        }
