"""RUN/model holds a whole model: what was trained is what is loaded, also with LoRA; other tables are
refused."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_shards.schema import read_manifest
from data_shards.settings import to_yaml
from tests.tiny_folder import make_tiny_folder, relist
from trainer.config import Config
from trainer.configs import config_from_dict, load_config
from trainer.data import EvalStream
from trainer.data.cf_table import cf_digest, cf_path, load_cf, save_cf
from trainer.data.folder import PreparedFolder
from trainer.errors import DataError, RunError
from trainer.models.backbones.frozen import check_frozen, save_frozen_identity
from trainer.models.contract import Ranker
from trainer.models.gensr.model import GenSR
from trainer.models.layers.embedding import ItemTable, table_sizes
from trainer.models.zoo import model_class
from trainer.runs.checkpoint import Checkpoint, Progress, check_identity
from trainer.runs.data_identity import check_data, what_is_read
from trainer.runs.warm_start import init_from
from trainer.runs.weights import build_model, load_run_model, read_model_document, save_model
from trainer.runtime.files import file_sha256
from trainer.training.setup import run_identity

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
    for parameter in plain.parameters():  # another backbone of the same shape, in the same place
        parameter.add_(0.1)
    plain.backbone.base.save_pretrained(backbone)
    with pytest.raises(DataError, match=r"is not the one that .* was trained on: model\.safetensors"):
        load_run_model(tmp_path / "run")
    for name in ("backbone/weights.json", "files.json"):  # as older runs are
        (tmp_path / "run" / "model" / name).unlink()
    load_run_model(tmp_path / "run")


def change_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("red", "tan"))


def change_tokens(folder: Path) -> None:
    path = folder / "catalog" / "item_tokens-000000.npy"
    np.save(path, np.load(path)[::-1])


def change_settings(folder: Path) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    raw["text"]["item_tokens"] = 16
    path.write_text(json.dumps(raw))


def add_vocabulary(folder: Path) -> None:
    np.save(folder / "catalog" / "words.npy", np.arange(3))


def change_users(folder: Path) -> None:
    pq.write_table(pa.table({"user_id": ["other"] * 24}), folder / "catalog" / "users.parquet")


@pytest.mark.parametrize(("now", "message"), [("b" * 40, r"revision b{12} \(was a{12}\)"), ("a" * 40, "")])
def test_adapters_belong_to_one_revision_of_a_hubs_backbone(tmp_path: Path, now: str, message: str) -> None:
    def backbone(commit: str) -> Any:
        return SimpleNamespace(base=SimpleNamespace(config=SimpleNamespace(_commit_hash=commit)))

    (tmp_path / "backbone").mkdir()
    save_frozen_identity("google/flan-t5-base", backbone("a" * 40), tmp_path)
    if not message:
        check_frozen("google/flan-t5-base", backbone(now), tmp_path)
        return
    with pytest.raises(DataError, match=message):
        check_frozen("google/flan-t5-base", backbone(now), tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_tokenizer, r": tokenizer/tokenizer\.json\. "),
        (change_tokens, r": catalog/item_tokens-000000\.npy\. "),
        (change_settings, r": item_tokens=16 \(was 8\)\. "),
        (add_vocabulary, r": catalog/words\.npy\. "),
        (change_users, ""),
    ],
)
def test_a_folder_of_the_same_split_with_other_text_is_refused(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], named: str
) -> None:
    trained(folder, tmp_path / "run")
    change(folder)
    relist(folder)
    if not named:  # GenSR does not read it
        load_run_model(tmp_path / "run")
        return
    with pytest.raises(DataError, match=named):
        load_run_model(tmp_path / "run")


def test_a_model_that_noted_nothing_is_compared_by_its_tokenizer_and_warned_of(
    folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    trained(folder, tmp_path / "run")
    path = tmp_path / "run" / "model" / "model.json"
    path.with_name("files.json").unlink()
    document = json.loads(path.read_text())
    del document["reads"]
    path.write_text(json.dumps(document))
    load_run_model(tmp_path / "run")
    assert not [warning for warning in recwarn if "was not noted" in str(warning.message)]
    change_tokens(folder)
    relist(folder)
    with pytest.warns(UserWarning, match="was not noted"):
        load_run_model(tmp_path / "run")
    change_tokenizer(folder)
    relist(folder)
    with pytest.raises(DataError, match=r"tokenizer/tokenizer\.json"):
        load_run_model(tmp_path / "run")


def test_what_a_model_may_read_is_compared_where_it_was_noted(folder: Path, tmp_path: Path) -> None:
    path = folder / "catalog" / "item_category-000000.npy"
    np.save(path, np.zeros((130, 2), np.int32))
    relist(folder)
    before = PreparedFolder.at(folder)
    document = {
        "split_fingerprint": before.manifest.fingerprint,
        "reads": what_is_read({"item_category"}, before),
    }
    older = {**document, "reads": what_is_read(set(), before)}
    np.save(path, np.ones((130, 2), np.int32))
    relist(folder)
    now = PreparedFolder.at(folder)
    check_data(older, set(), now, tmp_path, "run", {"item_category"})
    with pytest.raises(DataError, match=r"item_category-000000\.npy"):
        check_data(document, set(), now, tmp_path, "run", {"item_category"})


def test_another_collaborative_table_is_refused(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path / "run")
    manifest = read_manifest(folder)
    table = load_cf(folder, manifest)
    cf_path(folder).unlink()
    table.item.add_(1.0)
    save_cf(folder, table)
    with pytest.raises(DataError, match="not the one"):
        load_run_model(tmp_path / "run")


def test_a_table_made_again_is_the_same_table(folder: Path, tmp_path: Path) -> None:
    """Also where the file has its metadata in another order, and for a run that recorded the file's hash."""
    trained(folder, tmp_path / "run")
    path, table = cf_path(folder), load_cf(folder, read_manifest(folder))
    files, digest = {path.read_bytes()}, cf_digest(path)
    for _ in range(6):
        save_cf(folder, table)
        files.add(path.read_bytes())
    assert len(files) == 1
    tensors = load_file(path)
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    assert list(metadata) and cf_digest(path) == digest
    document_path = tmp_path / "run" / "model" / "model.json"
    document_path.with_name("files.json").unlink()  # older ones, in which it is changed here
    document = json.loads(document_path.read_text())
    assert document["cf_sha256"] == digest
    document_path.write_text(json.dumps({**document, "cf_sha256": file_sha256(path)}))
    load_run_model(tmp_path / "run")
    document_path.write_text(json.dumps(document))
    while path.read_bytes() in files:  # in any other order
        save_file(tensors, path, metadata)
    path.with_suffix(".sha256").unlink()
    assert cf_digest(path) == digest
    load_run_model(tmp_path / "run")
    tensors["item"][0, 0] += 1
    save_file(tensors, path, metadata)
    assert cf_digest(path) != digest


def test_a_checkpoint_that_names_the_file_of_its_cf_table_is_continued(folder: Path) -> None:
    config = load_config(None, [*OVERRIDES, f"data.dir={folder}"])
    opened, accelerator = PreparedFolder.at(folder), Accelerator(cpu=True)

    def named(recorded: str) -> str:
        identity = {**run_identity(config, opened, accelerator, None, GenSR), "cf_digest": recorded}
        found = Checkpoint(folder, Progress(), identity, "")
        now = run_identity(config, opened, accelerator, None, GenSR, found)
        check_identity(found, now)
        return str(now["cf_digest"])

    of_file = file_sha256(cf_path(folder))
    assert named(of_file) == of_file and named(opened.cf_digest) == opened.cf_digest != of_file
    with pytest.raises(RunError, match="cf"):
        named("0" * 64)


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

    taken = init_from(second, tmp_path / "first", prepared)

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
        init_from(other, tmp_path / "first", prepared)
    with pytest.raises(RunError, match="no trained model"):
        init_from(other, tmp_path / "nothing", prepared)


def small(name: str, folder: Path, *overrides: str) -> tuple[Ranker, Config, PreparedFolder]:
    """A new model; the same weights for the same arguments."""
    settings = [f"model.name={name}", "data.history_max=6", f"data.dir={folder}", *overrides]
    config, prepared = load_config(None, settings), PreparedFolder.at(folder)
    torch.manual_seed(0)
    needs = model_class(name).reads(config.model) | {"item_text"}
    return build_model(config, prepared, prepared.tables(needs)), config, prepared


def save_small(name: str, folder: Path, run: Path, *overrides: str) -> dict[str, Tensor]:
    """A run with a model whose weights are all others. → they"""
    model, config, prepared = small(name, folder, *overrides)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    run.mkdir()
    save_model(run / "model", model, model.state_dict(), config, prepared)
    return dict(model.named_parameters())


def goes_on_from(folder: Path, *others: Path) -> Path:
    """The folder, whose manifest says so."""
    manifests = [read_manifest(other) for other in others]
    kinds = ("users", "items", "queries", "categories")
    entries = [{"manifest": m.hash, **{kind: getattr(m, f"num_{kind}") for kind in kinds}} for m in manifests]
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "appended": entries}))
    return folder


def test_tables_of_a_folder_that_goes_on_keep_the_rows_of_the_runs(folder: Path, tmp_path: Path) -> None:
    between = make_tiny_folder(tmp_path / "between", num_users=25, num_items=132)
    longer = make_tiny_folder(tmp_path / "longer", num_users=27, num_items=137)
    was = save_small("bpr_mf", folder, tmp_path / "run")
    model, _, prepared = small("bpr_mf", goes_on_from(longer, folder, between))
    fresh = {name: weight.clone() for name, weight in model.named_parameters()}

    taken = init_from(model, tmp_path / "run", prepared)

    assert taken == (
        f"2 of 2 weights from {tmp_path}/run (bpr_mf); users: 24 of 27 rows; items: 130 of 137 rows"
    )
    for name, weight in model.named_parameters():
        then = len(was[name])
        assert weight[:then].equal(was[name]) and weight[then:].equal(fresh[name][then:]), name
    assert len(was) == 2


def test_what_stands_behind_the_items_is_not_taken_for_an_item(folder: Path, tmp_path: Path) -> None:
    longer = goes_on_from(make_tiny_folder(tmp_path / "longer", num_items=137), folder)
    for name in ("bert4rec", "query_seqrec"):  # [MASK]; words
        was = save_small(name, folder, tmp_path / name)["core.items.weight"]
        model, _, prepared = small(name, longer)
        fresh = model.get_parameter("core.items.weight").clone()

        taken = init_from(model, tmp_path / name, prepared)

        items = model.get_parameter("core.items.weight")
        assert "items: 130 of 137 rows" in taken and len(items) > 138
        assert items[:131].equal(was[:131]) and items[138:].equal(was[131:]), name
        assert items[131:138].equal(fresh[131:138]), name


def test_users_and_items_that_grow_alike_are_told_apart_by_their_tables(folder: Path, tmp_path: Path) -> None:
    one = make_tiny_folder(tmp_path / "one", num_users=130)
    two = goes_on_from(make_tiny_folder(tmp_path / "two", num_users=137, num_items=137), one)
    was = save_small("bpr_mf", one, tmp_path / "run")
    model, _, prepared = small("bpr_mf", two)
    assert init_from(model, tmp_path / "run", prepared).endswith("(bpr_mf); users or items: 130 of 137 rows")
    for name, weight in model.named_parameters():
        assert weight[:131].equal(was[name]), name


@pytest.mark.parametrize(
    ("known", "overrides", "left"),
    [
        (False, (), "core.items.weight"),
        (True, ("data.history_max=13",), "core.positions.weight"),  # seven more, as the items are
        (True, ("model.dim=32",), "core.items.weight"),
    ],
)
def test_a_table_of_another_shape_is_left_as_it_is(
    folder: Path, tmp_path: Path, known: bool, overrides: tuple[str, ...], left: str
) -> None:
    save_small("sasrec", folder, tmp_path / "run")
    longer = make_tiny_folder(tmp_path / "longer", num_items=137)
    goes_on_from(longer, folder if known else make_tiny_folder(tmp_path / "another", seed=1))
    model, _, prepared = small("sasrec", longer, *overrides)
    fresh = model.get_parameter(left).clone()
    taken = init_from(model, tmp_path / "run", prepared)
    assert model.get_parameter(left).equal(fresh)
    assert left in taken.partition("another shape, new: ")[2]
    assert ("items: 130 of 137 rows" in taken) == (left == "core.positions.weight")


def flip_weight(model: Path) -> None:
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_heads(model: Path) -> None:
    path = model / "model.json"
    path.write_text(path.read_text().replace('"num_heads": 2', '"num_heads": 1'))


def cut_tokenizer(model: Path) -> None:
    path = model / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-20])


def remove_backbone(model: Path) -> None:
    (model / "backbone" / "config.json").unlink()


def spoil_the_list(model: Path) -> None:
    (model / "files.json").write_text('{"model.json": 3}')


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_weight, r"model\.safetensors: checksum differs"),
        (change_heads, r"model\.json: checksum differs"),
        (cut_tokenizer, r"tokenizer\.json: \d+ bytes, expected"),
        (remove_backbone, r"backbone/config\.json: missing"),
        (spoil_the_list, r"files\.json: damaged"),
    ],
)
def test_a_saved_model_is_read_as_it_was_written_or_not_at_all(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    trained(folder, tmp_path / "run")
    load_run_model(tmp_path / "run")
    damage(tmp_path / "run" / "model")
    with pytest.raises(DataError, match=named):
        load_run_model(tmp_path / "run")


@pytest.mark.parametrize("line", ["history_max: 3", "num_heads: 1"])
def test_a_configuration_that_is_not_the_models_is_refused(folder: Path, tmp_path: Path, line: str) -> None:
    trained(folder, tmp_path / "run")
    path, key = tmp_path / "run" / "config.yaml", line.partition(":")[0]
    path.write_text(re.sub(rf"\b{key}: \d+", line, path.read_text()))
    with pytest.raises(RunError, match=rf"config\.yaml has changed .*{key}="):
        load_run_model(tmp_path / "run")


def test_a_run_that_has_not_got_that_far_says_how_it_goes_on(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no trained model .*\. Train one with: gensr train$"):
        read_model_document(tmp_path / "model")
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "status.json").write_text('{"status": "stopped", "progress": {"step": 1200}}')
    message = (
        r"Its run has stopped at step 1,200\. Continue it with: gensr train .*/config\.yaml --resume auto$"
    )
    with pytest.raises(RunError, match=message):
        read_model_document(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "table"), [("gensr", "backbone.model.shared.weight"), ("qem", "core.words.vectors.weight")]
)
def test_tokens_of_another_tokenizer_are_not_taken(
    name: str, table: str, folder: Path, tmp_path: Path
) -> None:
    """Of as many tokens, from the same log: row 7 is another word."""
    was = save_small(name, folder, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tokenizer = other / "tokenizer" / "tokenizer.json"
    swapped = json.loads(tokenizer.read_text())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["user"], vocabulary["item"] = vocabulary["item"], vocabulary["user"]
    for is_swapped in (False, True):
        if is_swapped:
            tokenizer.write_text(json.dumps(swapped))
            relist(other)
        model, _, prepared = small(name, other)
        fresh = model.get_parameter(table).clone()
        taken = init_from(model, tmp_path / "run", prepared)
        assert model.get_parameter(table).equal(fresh if is_swapped else was[table])
        assert (table in taken.partition("tokens of another tokenizer, new: ")[2]) == is_swapped


def test_tables_are_not_taken_from_a_folder_whose_rows_are_others(folder: Path, tmp_path: Path) -> None:
    """Of as many users and items; where it is the same ones under another split, they are."""
    was = save_small("sasrec", folder, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(small("sasrec", folder)[1]))
    other = make_tiny_folder(tmp_path / "other", seed=1)
    for renamed in (False, True):
        if renamed:
            items = pq.read_table(other / "catalog" / "items.parquet")
            ids = [f"other-{number}" for number in range(len(items))]
            place = items.schema.get_field_index("item_id")
            pq.write_table(items.set_column(place, "item_id", [ids]), other / "catalog" / "items.parquet")
            relist(other)
        model, _, prepared = small("sasrec", other)
        fresh = model.get_parameter("core.items.weight").clone()
        taken = init_from(model, tmp_path / "run", prepared)
        items_now = model.get_parameter("core.items.weight")
        assert items_now.equal(fresh if renamed else was["core.items.weight"])
        assert ("rows of other users and items, new: core.items.weight" in taken) == renamed
        assert model.get_parameter("core.positions.weight").equal(was["core.positions.weight"])
    alone = small("bpr_mf", other)[0]
    save_small("bpr_mf", folder, tmp_path / "tables")
    with pytest.raises(RunError, match="rows mean others in"):
        init_from(alone, tmp_path / "tables", prepared)


def test_plain_tables_are_known_by_their_rows() -> None:
    """As a model of one's own has them: one row more than there are items, words, …; no other is one."""
    tables = {"clicked": nn.Embedding(8, 2), "words": nn.EmbeddingBag(12, 2), "kinds": nn.Embedding(2, 2)}
    model = nn.ModuleDict({**tables, "core": ItemTable(7, 2, extra=1), "map": nn.Linear(7, 8)})
    assert table_sizes(model, {7, 11}) == {"clicked.weight": 7, "words.weight": 11, "core.weight": 7}


def test_a_run_whose_prepared_folder_has_moved_says_where_to_name_it(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_small("sasrec", folder, run)
    _, config, _ = small("sasrec", folder)
    gone = replace(config, data=replace(config.data, dir=str(tmp_path / "gone")))
    (run / "config.yaml").write_text(to_yaml(gone))
    with pytest.raises(RunError, match=r"gone is not there.*set data\.dir in .*config\.yaml \(.*--data\)$"):
        load_run_model(run)
    (run / "config.yaml").write_text(to_yaml(config))
    load_run_model(run)
