"""run.init_from for every model: begun with the weights of a run it scores as the run does, on the same
folder and on one that goes on from it."""

import re
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_shards.schema import Manifest, manifest_hash
from tests.contract.models import TRAINED, config_of, fitted, scores_of, some_events
from trainer.batch import Batch, ItemTables
from trainer.data.folder import PreparedFolder
from trainer.errors import RunError
from trainer.models.contract import Ranker
from trainer.models.zoo import model_class
from trainer.runs.warm_start import init_from
from trainer.runs.weights import build_model, save_model

MORE = {"users": 3, "items": 11, "queries": 4, "categories": 2}
READ_ALL_ITEMS = {"gensr"}  # how rare words are in the catalogue
trained_models = pytest.mark.parametrize("name", TRAINED)


class Appended(PreparedFolder):
    """The folder with MORE of everything behind what it has; of the new nobody clicked anything."""

    def tables(self, needs: frozenset[str], with_folds: bool = False) -> ItemTables:
        tables = PreparedFolder.at(self.path).tables(needs, with_folds)
        grown = {f.name: self._grown(f.name, getattr(tables, f.name)) for f in fields(tables)}
        return ItemTables(**grown)

    def _grown(self, name: str, rows: Tensor) -> Tensor:
        kind = "users" if name == "cf_users" else "queries" if name.startswith("query") else "items"
        dim = 1 if name == "cf_folds" else 0
        return torch.cat([rows, rows.narrow(dim, 0, MORE[kind])], dim) if rows.shape[dim] else rows

    def texts(self) -> tuple[list[str], list[str]]:
        items, queries = super().texts()
        return items + items[: MORE["items"]], queries + queries[: MORE["queries"]]

    def category_paths(self) -> list[tuple[str, ...]]:
        paths = super().category_paths()
        return paths + [(f"another {number}",) for number in range(MORE["categories"])]


def appended(folder: PreparedFolder) -> Appended:
    raw, then = folder.manifest.raw, folder.manifest.raw["counts"]
    was = {"manifest": folder.manifest.hash, **{kind: then[kind] for kind in MORE}}
    counts = {**then, **{kind: then[kind] + more for kind, more in MORE.items()}}
    raw = {**raw, "counts": counts, "appended": [was]}
    return Appended(folder.path, Manifest(raw, manifest_hash(raw)), "appended")


def new_model(name: str, folder: PreparedFolder) -> Ranker:
    """Not counted yet: set_up() takes the weights before."""
    torch.manual_seed(1)
    config = config_of(name)
    return build_model(config, folder, folder.tables(model_class(name).reads(config.model), with_folds=True))


def saved(name: str, folder: PreparedFolder, run: Path) -> tuple[Ranker, Batch]:
    """The model of a run, and events."""
    model, _ = fitted(name, folder.path)
    save_model(run / "model", model, model.state_dict(), config_of(name), folder)
    return model, some_events(model, folder)


def assert_scores_as(of_run: Ranker, model: Ranker, batch: Batch) -> None:
    model.fit()
    torch.testing.assert_close(scores_of(model.eval(), batch), scores_of(of_run, batch), atol=1e-5, rtol=1e-5)


@trained_models
def test_on_the_same_folder_it_scores_as_the_run(name: str, texts: PreparedFolder, tmp_path: Path) -> None:
    of_run, batch = saved(name, texts, tmp_path)
    model = new_model(name, texts)
    init_from(model, tmp_path, texts)
    assert_scores_as(of_run, model, batch)


@trained_models
def test_on_a_folder_that_goes_on_from_the_runs_every_row_is_taken(
    name: str, texts: PreparedFolder, tmp_path: Path
) -> None:
    of_run, batch = saved(name, texts, tmp_path)
    folder, was = appended(texts), dict(of_run.named_parameters())
    model, fresh = new_model(name, folder), dict(new_model(name, folder).named_parameters())

    taken = init_from(model, tmp_path, folder)

    told = [re.sub(r"^(\d+) of \1 weights from .*", "all", part) for part in taken.split("; ")]
    assert ("kept: ids" in told) == bool(model.kept)
    told = [part for part in told if part != "kept: ids"]
    kinds = {more: kind for kind, more in MORE.items()}
    expected = set()
    for key, weight in model.named_parameters():
        if weight.shape == was[key].shape:
            assert weight.equal(was[key]), key
            continue
        more = len(weight) - len(was[key])
        first_new = 1 + texts.manifest.raw["counts"][kinds[more]]
        expected.add(f"{kinds[more]}: {first_new - 1} of {first_new - 1 + more} rows")
        assert weight[:first_new].equal(was[key][:first_new]), key
        assert weight[first_new : first_new + more].equal(fresh[key][first_new : first_new + more]), key
        assert weight[first_new + more :].equal(was[key][first_new:]), key
    assert told[0] == "all" and len(told) == 1 + len(expected) and set(told[1:]) == expected
    if name not in READ_ALL_ITEMS:
        assert_scores_as(of_run, model, batch)
    for buffer in model.kept:  # of new items there are some, and no two alike
        rows, old = model.get_buffer(buffer), of_run.get_buffer(buffer)
        assert rows[: len(old)].equal(old) and len(rows.unique(dim=0)) == len(rows) > len(old)
        assert (rows != 0).any(1).all()


@trained_models
def test_on_another_folder_of_the_same_size_tables_begin_anew(
    name: str, texts: PreparedFolder, tmp_path: Path
) -> None:
    """Their rows are of other users and items there. A table is what grows with the folder."""
    raw = {**texts.manifest.raw, "split": {**texts.manifest.raw["split"], "fingerprint": "another"}}
    another = PreparedFolder(texts.path, Manifest(raw, manifest_hash(raw)), "another")
    of_run, _ = fitted(name, texts.path)
    save_model(tmp_path / "model", of_run, of_run.state_dict(), config_of(name), another)
    model, fresh = new_model(name, texts), dict(new_model(name, texts).named_parameters())
    grown = dict(new_model(name, appended(texts)).named_parameters())
    with suppress(RunError):  # it has nothing but tables
        init_from(model, tmp_path, texts)
    for key, weight in model.named_parameters():
        assert weight.shape == grown[key].shape or weight.equal(fresh[key]), key
