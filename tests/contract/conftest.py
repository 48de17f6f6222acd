"""Prepared folders with items that nobody clicked, and one run of each model."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from data_shards.prepare import prepare
from tests.conftest import SMALL
from tests.contract.models import config_of
from tests.worlds import write_tables
from trainer.cf.build import train_cf
from trainer.config import Config
from trainer.data.folder import PreparedFolder
from trainer.evaluation.full import evaluate_full
from trainer.evaluation.sampled import evaluate_run
from trainer.training.loop import train

NUM_STEPS = 4


def _world(folder: Path, anonymised: bool) -> PreparedFolder:
    raw = write_tables(folder / "raw", items=300, anonymised=anonymised)
    prepare("tables", raw, folder / "prepared", SMALL)
    train_cf(folder / "prepared", ["cf.dim=16", "cf.max_epochs=2", "cf.num_folds=2"])
    return PreparedFolder.at(folder / "prepared")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> PreparedFolder:
    """Natural text, a CF table of two folds. Read-only."""
    return _world(tmp_path_factory.mktemp("contract_texts"), anonymised=False)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> PreparedFolder:
    """The same with anonymised words. Read-only."""
    return _world(tmp_path_factory.mktemp("contract_words"), anonymised=True)


@pytest.fixture(scope="session")
def run_of(texts: PreparedFolder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """run_of(name): the run folder of a model that train() trained for NUM_STEPS steps, or counted."""
    runs = tmp_path_factory.mktemp("contract_runs")

    @cache
    def run(name: str) -> Path:
        result = train(run_config(name, texts, runs / name))
        assert (result.status, result.exit_code) == ("finished", 0)
        return runs / name

    return run


@pytest.fixture(scope="session")
def evaluated(run_of: Callable[[str], Path]) -> Callable[[str], tuple[Path, list[dict[str, Any]]]]:
    """evaluated(name): the same, and what the evaluations of sampled candidates and of the whole catalogue
    returned. They kept the 12 best candidates."""

    @cache
    def evaluate(name: str) -> tuple[Path, list[dict[str, Any]]]:
        full = evaluate_full(run_of(name), max_events=20, with_baselines=False, num_best=12)
        return run_of(name), [evaluate_run(run_of(name), with_baselines=False, num_best=12), full]

    return evaluate


def run_config(name: str, folder: PreparedFolder, run_dir: Path, *overrides: str) -> Config:
    places = (f"data.dir={folder.path}", f"run.dir={run_dir}")
    return config_of(name, *places, f"run.max_steps={NUM_STEPS}", "run.validate_every_steps=4", *overrides)
