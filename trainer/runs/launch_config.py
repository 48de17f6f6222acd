"""The configuration that a command asks for, on the processes that will train it."""

import json
from collections.abc import Sequence
from pathlib import Path

from trainer.config import Config
from trainer.configs import gives_micro_batch, load_config, with_micro_batch
from trainer.runs.run_folder import RunFolder


def load_launch_config(
    preset_or_file: str | None, overrides: Sequence[str], world_size: int, resume: bool
) -> Config:
    """`load_config` for `world_size` processes. A run that is continued keeps the micro-batch that was
    lowered for the processes it began on, where that divides the batch on these as well: another one would be
    another run. Its own configuration means the folder that it lies in, also where that has moved. Raises
    ConfigError."""
    home = RunFolder(Path(preset_or_file or "").parent)
    if resume and home.status.is_file() and home.config == Path(preset_or_file or ""):
        overrides = [f"run.dir={json.dumps(str(home.path))}", *overrides]
    config = load_config(preset_or_file, overrides, world_size)
    begun = RunFolder(Path(config.run.dir)).config
    if not (resume and config.run.dir and begun.is_file() and begun.stat().st_size):
        return config
    if gives_micro_batch(preset_or_file, overrides):
        return config
    before = RunFolder(config.run.dir).read_config().optim
    of_preset = config.optim.preset_micro_batch_size or config.optim.micro_batch_size
    if before.preset_micro_batch_size != of_preset:
        return config
    return with_micro_batch(config, before.micro_batch_size, world_size)
