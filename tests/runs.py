"""Run folders for tests: made without training, so in a second or two."""

import json
import shutil
from pathlib import Path

import torch

from data_shards.schema import read_manifest
from data_shards.settings import to_yaml
from trainer.cf.build import train_cf
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.models.gensr.model import GenSR
from trainer.models.zoo import model_class
from trainer.runs.weights import build_model, save_model

EVALUATION = {
    "protocol": {"candidates": "sampled", "num_negatives": 20},
    "rec": {
        "recall@5": 0.5,
        "recall@10": 0.7,
        "ndcg@5": 0.3,
        "ndcg@10": 0.4,
        "mrr": 0.2,
        "num_events": 40,
        "ci95": {"ndcg@10": [0.35, 0.45]},
    },
    "src": {"num_events": 0},
}


def make_run(folder: Path, source: Path, *overrides: str, holdout: str = "none") -> Path:
    """A copy of a prepared folder, a CF table and a run whose model has random weights: scores need no
    training to be compared."""
    data, run_dir = folder / "data", folder / "runs" / "one"
    shutil.copytree(source, data)
    train_cf(data, ["cf.dim=16", "cf.max_epochs=2", f"cf.holdout={holdout}", "overwrite=true"])
    run_dir.mkdir(parents=True)
    config = load_config(
        None,
        [
            f"data.dir={data}",
            f"run.dir={run_dir}",
            "model.backbone=scratch:mini",
            "data.history_max=5",
            *overrides,
        ],
    )
    read_manifest(data)
    torch.manual_seed(0)
    model = build_model(
        config, PreparedFolder.at(data), PreparedFolder.at(data).tables(GenSR.needs, with_folds=True)
    )
    save_model(run_dir / "model", model, model.state_dict(), config, PreparedFolder.at(data))
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "environment.json").write_text(json.dumps({"git": {"commit": "0123abc", "dirty": False}}))
    (run_dir / "evaluation-test.json").write_text(json.dumps(EVALUATION))
    return run_dir


def make_other_run(run_dir: Path, name: str, *overrides: str) -> Path:
    """Beside a run of make_run(), on its prepared folder: another model with random weights, or counted."""
    data, other = run_dir.parents[1] / "data", run_dir.with_name(name)
    overrides = (f"data.dir={data}", f"run.dir={other}", f"model.name={name}", *overrides)
    config, folder = load_config(None, list(overrides)), PreparedFolder.at(data)
    torch.manual_seed(1)
    model = build_model(config, folder, folder.tables(model_class(name).reads(config.model)))
    model.fit()
    other.mkdir()
    save_model(other / "model", model, model.state_dict(), config, folder)
    (other / "config.yaml").write_text(to_yaml(config))
    (other / "status.json").write_text(json.dumps({"status": "finished", "progress": {"step": 1}}))
    return other


def checkpoints_of(run_dir: Path) -> list[str]:
    """Names of the checkpoints of a run, newest first."""
    return sorted((path.name for path in (run_dir / "checkpoints").glob("step-*")), reverse=True)
