"""The reference of `gensr bench train|evaluate` computes what the model computes: with the same weights it
gives the same scores."""

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.reference import Collator, Reference, pairs_of
from data_shards.schema import read_manifest
from trainer.cf.build import train_cf
from trainer.configs import load_config
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import build_model


def test_scores_are_the_models(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    train_cf(folder, ["cf.dim=16", "cf.max_epochs=1", "cf.holdout=none", "overwrite=true"])
    config = load_config(
        None,
        [
            "model.backbone=scratch:nano",
            "model.variant=paper",
            "model.prompt=paper",
            "data.history_max=5",
            "model.dropout=0",
        ],
    )
    read_manifest(folder)
    tables = PreparedFolder.at(folder).tables(GenSR.needs)
    torch.manual_seed(0)
    model = build_model(config, PreparedFolder.at(folder), tables).eval()
    assert isinstance(model, GenSR)
    reference = Reference(config, model.backbone.base, tables, model.answers).eval()
    missing, _ = reference.load_state_dict(model.state_dict(), strict=False)
    assert all(name.startswith("t5.") for name in missing), missing
    batch = next(iter(EvalStream(PreparedFolder.at(folder), "test", config.data, 8))).rows(0, 8)
    few = batch.with_candidates(batch.candidates[:, :3], batch.labels[:, :3])
    pairs = Collator(folder, "paper", model.answers, "cpu")(pairs_of(few))
    with torch.no_grad():
        ours = model.score(few).sigmoid()
    assert set(few.task.tolist()) == {0, 1}
    torch.testing.assert_close(reference.score(pairs).view(-1, 3), ours, rtol=0, atol=2e-5)
    assert float(reference(pairs)) > 0
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            reference.score({**pairs, "item": pairs["item"].flip(0)}).view(-1, 3), ours, rtol=0, atol=2e-5
        )
