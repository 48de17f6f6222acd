"""A run with optim.sparse_rows, in one process: its model is written whole, an interrupted one ends where the
undisturbed one does, and one on a folder that goes on begins with the rows. Several processes:
tests/distributed/test_sparse_rows_of_ranks.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_shards.schema import read_manifest
from tests.contract.models import BASE
from tests.tiny_folder import make_tiny_folder
from trainer.config import Config
from trainer.configs import load_config
from trainer.errors import ConfigError, RunError
from trainer.runs import checkpoint
from trainer.runs.checkpoint_convert import trained_weights
from trainer.runs.weights import load_run_model
from trainer.training.loop import train

WORDS = ("model.name=sasrec", "model.loss=bce", *BASE, "run.max_steps=4", "run.validate_every_steps=4")
ITEMS = "core.items.weight"


@pytest.fixture
def config_of(prepared: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(name: str, *more: str) -> Config:
        places = (f"data.dir={prepared}", f"run.dir={tmp_path / name}")
        return load_config(None, [*places, *WORDS, "optim.sparse_rows=100", *more])

    return make


def test_an_interrupted_run_ends_where_the_undisturbed_one_does(
    config_of: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: Callable[[int], None],
) -> None:
    train(config_of("undisturbed"))
    stop_after(2)
    assert train(config_of("stopped")).status == "stopped"
    found = checkpoint.read_checkpoint(tmp_path / "stopped" / "checkpoints" / "step-00000002")
    kept = load_file(found.path / checkpoint.ROWS)
    assert set(kept) == {ITEMS, *(f"{ITEMS}.{part}" for part in ("exp_avg", "exp_avg_sq", "step"))}
    assert int(kept[f"{ITEMS}.step"]) == 2
    assert ITEMS not in load_file(found.path / "model.safetensors"), "it is kept once"
    shapes = {ITEMS: kept[ITEMS].shape, "core.norm.weight": torch.Size([64])}
    with (
        monkeypatch.context() as patched
    ):  # it imports DeepSpeed, and only DeepSpeed's checkpoints are pickles
        patched.setattr("trainer.runs.checkpoint_convert.no_unpickling", None)
        assert torch.equal(trained_weights(found, shapes)[ITEMS], kept[ITEMS])
    with pytest.raises(RunError, match=r"optim\.sparse_rows"):
        train(config_of("stopped", "optim.sparse_rows=0"), resume="auto")

    assert train(config_of("stopped"), resume="auto").status == "finished"
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("undisturbed", "stopped"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one[ITEMS], kept[ITEMS]), "the table is trained"
    model, _config, _folder = load_run_model(tmp_path / "stopped")
    assert torch.equal(dict(model.named_parameters())[ITEMS], two[ITEMS])


def test_a_loss_that_scores_every_item_is_refused(config_of: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"every row has a gradient.*model\.loss=bce"):
        train(config_of("run", "model.loss=ce"))
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_on_a_folder_that_goes_on_begins_with_the_rows_of_another(
    config_of: Callable[..., Config], tmp_path: Path
) -> None:
    one, two = make_tiny_folder(tmp_path / "one"), make_tiny_folder(tmp_path / "two", num_items=137)
    train(config_of("first", f"data.dir={one}"))
    counts = {"users": 24, "items": 130, "queries": 12, "categories": 0}
    raw = json.loads((two / "manifest.json").read_text())
    raw["appended"] = [{"manifest": read_manifest(one).hash, **counts}]
    (two / "manifest.json").write_text(json.dumps(raw))

    train(config_of("second", f"data.dir={two}", f"run.init_from={tmp_path}/first", "optim.lr=1e-9"))

    was, rows = (load_file(tmp_path / run / "model/model.safetensors")[ITEMS] for run in ("first", "second"))
    assert (len(was), len(rows)) == (131, 138)
    torch.testing.assert_close(rows[:131], was, atol=1e-7, rtol=0)
    assert "items: 130 of 137 rows" in (tmp_path / "second" / "train.log").read_text()
