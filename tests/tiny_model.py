"""A small model and a batch of a tiny folder, for tests of what a device is asked for."""

from pathlib import Path

from data_shards.schema import read_manifest
from trainer.batch import Batch
from trainer.configs import load_config
from trainer.data import TrainStream
from trainer.data.folder import PreparedFolder
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import build_model

Made = tuple[GenSR, Batch]


def make_tiny_model(folder: Path, *overrides: str) -> Made:
    """A new model with every term of the loss, and the first 16 events of the training stream."""
    config = load_config(
        None, ["data.history_max=6", "model.contrastive_weight=0.1", "model.listwise_weight=1", *overrides]
    )
    read_manifest(folder)
    model = build_model(
        config, PreparedFolder.at(folder), PreparedFolder.at(folder).tables(GenSR.needs, with_folds=True)
    ).train()
    assert isinstance(model, GenSR)
    return model, next(iter(TrainStream(PreparedFolder.at(folder), config.data, 0, 16, 16, num_folds=2)))


def move(model: GenSR, batch: Batch, device: str) -> Batch:
    """The model, its tables and the batch → device."""
    model.to(device)
    model.set_tables(model.tables.to(device))
    return batch.to(device)
