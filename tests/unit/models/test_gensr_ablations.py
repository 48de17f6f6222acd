"""GenSR without one of its parts: what is left out has no say, and every weight keeps a gradient."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny_model import make_tiny_model
from trainer.cf.build import train_cf
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import build_model


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    path = tmp_path_factory.mktemp("ablated") / "data"
    shutil.copytree(prepared, path)
    train_cf(path, ["cf.dim=16", "cf.max_epochs=1", "cf.holdout=crossfit", "cf.num_folds=2"])
    return path


@pytest.mark.parametrize(
    "setting", ["model.views=cf", "model.views=semantic", "model.soft_filter=false", "model.views=both"]
)
def test_every_weight_keeps_a_gradient(folder: Path, setting: str) -> None:
    model, batch = make_tiny_model(folder, "model.backbone=scratch:nano", setting)
    loss, report = model(model.prepare(batch))
    loss.backward()
    assert loss.isfinite() and ("contrastive_loss" in report) == (setting[-2:] not in ("cf", "ic"))
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize(("cf_width", "named"), [(16, r"CF table's width 16"), (15, "scratch:nano")])
def test_heads_that_do_not_divide_a_width_are_refused(folder: Path, cf_width: int, named: str) -> None:
    config = load_config(None, ["model.backbone=scratch:nano", "model.num_heads=3"])
    prepared = PreparedFolder.at(folder)
    tables = prepared.tables(GenSR.needs, with_folds=False)
    tables = replace(tables, cf=torch.zeros(tables.num_items, cf_width))
    with pytest.raises(ConfigError, match=named):
        build_model(config, prepared, tables)


def changed_cf(model: GenSR) -> GenSR:
    model.set_tables(replace(model.tables, cf=model.tables.cf + 1, cf_folds=model.tables.cf_folds + 1))
    return model


@pytest.mark.parametrize(("setting", "reads_cf"), [("both", True), ("semantic", False)])
def test_a_view_that_is_left_out_has_no_say(folder: Path, setting: str, reads_cf: bool) -> None:
    model, batch = make_tiny_model(folder, "model.backbone=scratch:nano", f"model.views={setting}")
    model.eval()
    with torch.no_grad():
        before = model.score(batch)
        after = changed_cf(model).score(batch)
    assert torch.equal(before, after) != reads_cf


def test_without_the_soft_filter_the_history_counts_alike(folder: Path) -> None:
    model, batch = make_tiny_model(folder, "model.backbone=scratch:nano", "model.soft_filter=false")
    weights = model.eval().explain(batch)["cf"]
    real = batch.history_mask.sum(1)
    assert ((weights > 0).sum(-1) == real[:, None]).all()
    for row, number in zip(weights, real.tolist(), strict=True):
        if number:
            torch.testing.assert_close(row[row > 0], torch.full_like(row[row > 0], 1 / number))
