"""The planted preferences as a scorer of a prepared folder, made again from simulated.json alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from data_shards.errors import DataError
from data_shards.prepare import prepare
from data_shards.schema import SRC
from data_shards.simulate import csv_tables, simulate
from data_shards.simulate.oracle import Oracle, oracle_scores, planted_clicks
from data_shards.simulate.simulated import Simulated
from data_shards.simulate.world import make_users
from trainer.cli import app
from trainer.data.folder import PreparedFolder
from trainer.evaluation.optimum import optimum_report, read_optimum
from trainer.evaluation.sampled import baseline_reports

SMALL: dict[str, Any] = {"users": 150, "items": 400, "days": 6, "seed": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The logs and the folder prepared from them."""
    root = tmp_path_factory.mktemp("oracle")
    simulate(root / "raw", **SMALL, text="natural")
    prepare("tables", root / "raw", root / "data", ["min_interactions=2", "vocab_size=600"])
    return root / "raw", root / "data"


def test_scores_are_those_of_the_world_whatever_the_ids(folders: tuple[Path, Path]) -> None:
    world = Simulated.read(folders[0]).world()
    clicks = planted_clicks(world, 24.0)
    rng = np.random.default_rng(0)
    # a folder with some users and all items, in another order than the world's
    user_of_row = rng.permutation(world.num_users)[:100]
    item_of_row = rng.permutation(world.num_items)
    oracle = Oracle(
        folders[0], csv_tables.user_ids(world)[user_of_row].tolist(), world.public_item[item_of_row].tolist()
    )
    known = clicks.take(np.flatnonzero(np.isin(clicks.user, user_of_row))[::7])
    candidates = rng.integers(0, world.num_items, (len(known.user), 20))  # rows of the folder
    wanted = oracle_scores(world, make_users(world, 0, world.num_users), known, item_of_row[candidates])
    row_of_user, row_of_item = np.zeros(world.num_users, int), np.argsort(item_of_row)
    row_of_user[user_of_row] = np.arange(100)
    task = np.where(known.search, SRC, 1 - SRC)
    scores = oracle.scores(row_of_user[known.user], row_of_item[known.item], task, candidates)
    assert np.array_equal(scores, wanted)


@pytest.mark.parametrize("wrong", [{"users": "20"}, {"items": -5}, {"rows_per_day": None}])
def test_a_wrong_argument_in_simulated_json_is_named(
    folders: tuple[Path, Path], tmp_path: Path, wrong: dict[str, Any]
) -> None:
    document = json.loads((folders[0] / "simulated.json").read_text())
    (tmp_path / "simulated.json").write_text(json.dumps({**document, **wrong}))
    with pytest.raises(DataError, match=rf"simulated\.json: {next(iter(wrong))}: .* Simulate the logs again"):
        Simulated.read(tmp_path)


def test_the_optimum_is_above_what_counting_reaches(folders: tuple[Path, Path]) -> None:
    folder = PreparedFolder.at(folders[1])
    optimum, counted = optimum_report(folder, folders[0]), baseline_reports(folder, "test")
    assert optimum["split_fingerprint"] == folder.manifest.fingerprint
    assert optimum["rec"]["num_events"] == counted["popularity"]["rec"]["num_events"]
    assert optimum["rec"]["ndcg@10"] > counted["popularity"]["rec"]["ndcg@10"] + 0.2
    assert optimum["src"]["ndcg@10"] > counted["bm25"]["src"]["ndcg@10"] + 0.1


def test_the_verb_writes_what_tables_read(folders: tuple[Path, Path]) -> None:
    raw, data = folders
    result = CliRunner().invoke(app, ["optimum", str(data), str(raw), "--json"])
    assert result.exit_code == 0, result.output
    shown, read = json.loads(result.stdout), read_optimum(PreparedFolder.at(data))
    assert shown == read and read["src"]["ndcg@10"] > 0.5


def test_logs_that_the_folder_does_not_come_from_are_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = PreparedFolder.at(folders[1])
    with pytest.raises(DataError, match=r"simulated\.json is missing"):
        optimum_report(folder, tmp_path)
    arguments = json.loads((folders[0] / "simulated.json").read_text())
    for other in ({"seed": 7}, {"items": 300}):
        (tmp_path / "simulated.json").write_text(json.dumps(arguments | other))
        with pytest.raises(DataError, match="does not come from the logs"):
            optimum_report(folder, tmp_path)
    (tmp_path / "simulated.json").write_text(json.dumps({"seed": 7}))
    with pytest.raises(DataError, match="must hold days, items"):
        optimum_report(folder, tmp_path)


def test_image_atlases_that_a_filter_has_kept_are_named(tmp_path: Path) -> None:
    simulate(tmp_path / "raw", **SMALL)
    prepare("kuaisar", tmp_path / "raw", tmp_path / "data", ["min_interactions=1", "vocab_size=300"])
    with pytest.raises(DataError, match=r"^[0-9]+ of the folder's items are image atlases .* min_inter"):
        optimum_report(PreparedFolder.at(tmp_path / "data"), tmp_path / "raw")
    prepare("kuaisar", tmp_path / "raw", tmp_path / "five", ["vocab_size=300", "num_negatives=20"])
    assert optimum_report(PreparedFolder.at(tmp_path / "five"), tmp_path / "raw")["src"]["ndcg@10"] > 0.5
