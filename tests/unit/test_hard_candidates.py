"""The same evaluation among mined negatives: other candidates, other files, no mixture."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import trainer.runs.weights
from data_shards.prepare import prepare
from tests.conftest import SMALL
from tests.unit.test_evaluate import item_id_scorer, stand_in
from tests.worlds import write_tables
from trainer.cli import app
from trainer.config import Config, DataConfig
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError, RunError
from trainer.evaluation.compare import compare
from trainer.evaluation.paired import check_same, read_stored
from trainer.evaluation.ranking import rank_events
from trainer.evaluation.sampled import evaluate_run
from trainer.evaluation.summary import protocol_line

WIDTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("hard")
    prepare("tables", write_tables(base / "raw"), base / "out", [*SMALL, f"hard_negatives={WIDTH}"])
    return PreparedFolder.at(base / "out")


def test_each_kind_of_candidates_is_the_stored_column(folder):
    stored = folder.columns("test", ["event_id", "item", "negatives", "hard_negatives"])
    order = np.argsort(stored["event_id"])
    for kind, column in (("stored", "negatives"), ("hard", "hard_negatives")):
        for max_events in (0, 50):
            stream = EvalStream(folder, "test", DataConfig(), 16, max_events=max_events, candidates=kind)
            ranks = rank_events(item_id_scorer, stream)
            at = order[np.searchsorted(stored["event_id"][order], ranks.event_id)]
            expected = 1 + (stored[column][at] > stored["item"][at][:, None]).sum(1)
            assert np.array_equal(ranks.rank, expected), (kind, max_events)


def test_a_folder_without_them_says_how_to_make_them(prepared):
    with pytest.raises(DataError, match="hard_negatives=99 overwrite=true"):
        EvalStream(PreparedFolder.at(prepared), "test", DataConfig(), 8, candidates="hard")


def test_evaluate_writes_files_of_its_own(folder, tmp_path, monkeypatch):
    config = Config(data=DataConfig(dir=str(folder.path)))
    monkeypatch.setattr(trainer.runs.weights, "load_run_config", lambda run_dir: config)
    monkeypatch.setattr(
        trainer.runs.weights,
        "load_run_model",
        lambda run_dir, device: (stand_in(item_id_scorer), config, folder),
    )
    (tmp_path / "config.yaml").write_text("{}")
    document = evaluate_run(tmp_path, "valid", candidates="hard")
    assert (document["protocol"]["candidates"], document["protocol"]["num_negatives"]) == ("hard", WIDTH)
    assert json.loads((tmp_path / "evaluation-valid-hard.json").read_text()) == document
    assert protocol_line(document).startswith(f"hard: the clicked item among {WIDTH} mined negatives")
    assert set(document["baselines"]) == {"popularity", "bm25"}
    # BM25 mined the searches' negatives: against uniform ones it does far better
    plain = evaluate_run(tmp_path, "valid")
    bm25 = [one["baselines"]["bm25"]["src"]["mrr"] for one in (document, plain)]
    assert bm25[0] < bm25[1]
    assert document["segments"].keys() == plain["segments"].keys() == {"rec", "src"}
    assert sorted(path.name for path in tmp_path.glob("evaluation-*")) == [
        "evaluation-valid-hard.json",
        "evaluation-valid-hard.parquet",
        "evaluation-valid.json",
        "evaluation-valid.parquet",
    ]
    sampled, hard = (read_stored(tmp_path, name, name) for name in ("valid", "valid-hard"))
    with pytest.raises(RunError, match="different candidates"):
        check_same(sampled, hard)
    found = compare([tmp_path], "valid", "hard")["runs"][str(tmp_path)]
    assert found["rec"] == document["rec"]


def test_an_unknown_kind_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--candidates", "soft"])
    assert done.exit_code
    assert "sampled, hard or full" in str(done.exception)
