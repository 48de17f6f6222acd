"""RUN/model holds a whole model: what was trained is what is loaded, also with LoRA; other tables are
refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_shards.schema import read_manifest
from data_shards.settings import to_yaml
from tests.tiny_folder import make_tiny_folder
from trainer.config import Config
from trainer.configs import config_from_dict, load_config
from trainer.data import EvalStream
from trainer.data.cf_table import cf_path, load_cf, save_cf
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError, RunError
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import build_model, init_from, load_run_model, save_model

OVERRIDES = [
    "model.backbone=scratch:nano",
    "data.item_tokens=8",
    "data.history_tokens=4",
    "data.history_max=6",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_folder(tmp_path / "data")


def trained(folder: Path, run: Path, *overrides: str) -> tuple[GenSR, Config]:
    torch.manual_seed(3)
    config = load_config(None, [*OVERRIDES, *overrides, f"data.dir={folder}", f"run.dir={run}"])
    read_manifest(folder)
    model = build_model(
        config, PreparedFolder.at(folder), PreparedFolder.at(folder).tables(GenSR.needs, with_folds=True)
    )
    assert isinstance(model, GenSR)
    for parameter in model.parameters():  # "training": everything trainable moves
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    save_model(run / "model", model, model.state_dict(), config, PreparedFolder.at(folder))
    return model.eval(), config


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.lora.rank=4",),
        ("model.variant=paper",),
        ("model.backbone=scratch:qwen3_nano", "model.lora.rank=4", "model.lora.dora=true"),
    ],
)
@torch.no_grad()
def test_the_loaded_model_scores_as_the_trained_one(
    folder: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    model, config = trained(folder, tmp_path / "run", *overrides)
    batch = next(iter(EvalStream(PreparedFolder.at(folder), "test", config.data, 6)))
    loaded, _, _ = load_run_model(tmp_path / "run")
    # adapters are merged on loading
    torch.testing.assert_close(loaded.score(batch), model.score(batch), rtol=0, atol=1e-5)
    assert not any("lora_" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize(("size", "table"), [("nano", "shared"), ("llama_nano", "embed_tokens")])
@torch.no_grad()
def test_lora_on_a_local_backbone_saves_adapter_and_heads_only(
    folder: Path, tmp_path: Path, size: str, table: str
) -> None:
    plain, _ = trained(folder, tmp_path / "plain", f"model.backbone=scratch:{size}")
    backbone = tmp_path / "backbone"
    plain.backbone.base.save_pretrained(backbone)
    model, config = trained(folder, tmp_path / "run", f"model.backbone={backbone}", "model.lora.rank=4")
    names = load_file(tmp_path / "run" / "model" / "model.safetensors").keys()
    assert any("lora_A" in name for name in names) and not any(f"{table}.weight" in name for name in names)
    assert any(name.startswith("cf_filter") for name in names)
    batch = next(iter(EvalStream(PreparedFolder.at(folder), "test", config.data, 6)))
    torch.testing.assert_close(
        load_run_model(tmp_path / "run")[0].score(batch), model.score(batch), rtol=0, atol=1e-5
    )


def test_another_collaborative_table_is_refused(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path / "run")
    manifest = read_manifest(folder)
    table = load_cf(folder, manifest)
    cf_path(folder).unlink()
    table.item.add_(1.0)
    save_cf(folder, table)
    with pytest.raises(DataError, match="not the one"):
        load_run_model(tmp_path / "run")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        load_run_model(tmp_path)


def test_a_run_begins_with_the_weights_of_another_where_they_fit(folder: Path, tmp_path: Path) -> None:
    first, _ = trained(folder, tmp_path / "first")
    torch.manual_seed(4)
    overrides = [*OVERRIDES, "model.words_dim=3", "data.history_max=5", f"data.dir={folder}"]
    config = load_config(None, overrides)
    prepared = PreparedFolder.at(folder)
    second = build_model(config, prepared, prepared.tables(GenSR.needs, with_folds=True))
    new = {name: parameter.clone() for name, parameter in second.named_parameters()}

    taken = init_from(second, tmp_path / "first")

    theirs, same, others = dict(first.named_parameters()), 0, []
    for name, parameter in second.named_parameters():
        if theirs[name].shape == parameter.shape:
            assert parameter.equal(theirs[name]), name
            same += 1
        else:
            assert parameter.equal(new[name]), name
            others.append(name)
    assert others and taken.startswith(f"{same} of {len(new)} weights from ")
    assert all(name in taken for name in others) and "another shape" in taken


def test_a_run_does_not_begin_with_what_fits_nowhere(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path / "first")
    prepared = PreparedFolder.at(folder)
    other = build_model(
        config_from_dict({"model": {"name": "bpr_mf"}, "data": {"dir": str(folder)}}),
        prepared,
        prepared.tables(frozenset()),
    )
    with pytest.raises(RunError, match=r"run\.init_from=.*model\.name=bpr_mf.*gensr"):
        init_from(other, tmp_path / "first")
    with pytest.raises(RunError, match="no trained model"):
        init_from(other, tmp_path / "nothing")
