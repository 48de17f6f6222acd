"""Building a model, saving it to RUN/model, and getting it back. No pickle: safetensors, JSON and a tokenizer
file.

model/  model.safetensors  model.json (name, settings, what it was trained on)  tokenizer/tokenizer.json
        files.json (sealed.py)
        and what the model adds (GenSR: backbone/config.json; with LoRA its frozen weights stay out)
"""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from data_shards.schema import TASKS
from data_shards.settings import changes, flat_as_json
from trainer.batch import ItemTables
from trainer.config import Config, DataConfig
from trainer.configs import config_from_dict
from trainer.data.folder import PreparedFolder
from trainer.data.node_cache import is_url, refuse_command
from trainer.errors import DataError, RunError
from trainer.models.contract import Ranker, Ranks, task_names
from trainer.models.layers.embedding import tables_by_rows
from trainer.models.zoo import model_class, settings_class
from trainer.runs.checkpoint import FREE_KEYS
from trainer.runs.data_identity import check_data, what_is_read
from trainer.runs.run_folder import RunFolder, read_json
from trainer.runs.sealed import check_sealed, seal
from trainer.runs.world import counts_of, new_world, saved_world
from trainer.runtime.files import replace_folder

MODEL_FORMAT = 2  # 1: gensr.json, GenSR only
DOCUMENT, OLD_DOCUMENT = "model.json", "gensr.json"
WEIGHTS = "model.safetensors"


def build_model(
    config: Config, folder: PreparedFolder, tables: ItemTables, ranks: Ranks | None = None
) -> Ranker:
    """A new model of the configured kind for a prepared folder."""
    kind = model_class(config.model.name)
    model = kind(config.model, new_world(folder, config, tables, ranks))
    model.set_tasks(learnable_tasks(kind, folder))
    return model


def counted_model(name: str, settings: dict[str, Any], folder: PreparedFolder) -> Ranker:
    """A model that is counted from a prepared folder, not trained; ready to score on the CPU. It reads
    histories as long as the folder holds them."""
    data = DataConfig(dir=folder.name, history_max=folder.manifest.history_max)
    config = dataclasses.replace(Config(data=data), model=settings_class(name)(**settings))
    model = build_model(config, folder, folder.tables(model_class(name).reads(config.model)))
    model.fit()
    return model.eval()


def learnable_tasks(kind: type[Ranker], folder: PreparedFolder) -> tuple[int, ...]:
    """Those of a model's tasks that the training split has events of; all of a model that is not trained,
    such as BM25. Raises DataError for none."""
    if not kind.trained:
        return kind.tasks
    present = folder.tasks("train")
    tasks = tuple(task for task in kind.tasks if task in present)
    if not tasks:
        raise DataError(
            f"{folder.name}: no training events of {' and '.join(TASKS[task] for task in kind.tasks)}, the "
            f"task of {kind.title}. Look at it with: gensr inspect {shlex.quote(folder.name)}"
        )
    return tasks


def save_model(
    path: str | Path,
    model: Ranker,
    full_state: dict[str, Tensor],
    config: Config,
    folder: PreparedFolder,
    step: int = 0,
    begun_with: str = "",
) -> None:
    """Write RUN/model atomically. `full_state` is the consolidated state dict (accelerator.get_state_dict),
    with the tables that are trained by rows; `model` the unwrapped module. step: optimizer steps that made
    it; 0 for one that made none, which begun_with then says of which weights it is (sha256)."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = model.saved_names() | set(tables_by_rows(model))
    state = {name: full_state[name].detach().contiguous().cpu() for name in sorted(names)}
    save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
    shutil.copytree(folder.tokenizer, partial / "tokenizer")
    model.save_extra(partial)
    document = {**describe_model(model, config, folder), "step": step}
    document |= {"begun_with": begun_with} if begun_with else {}
    text = json.dumps(document, indent=2) + "\n"
    (partial / DOCUMENT).write_text(text, encoding="utf-8")
    seal(partial)
    replace_folder(partial, path)


def describe_model(model: Ranker, config: Config, folder: PreparedFolder) -> dict[str, Any]:
    """model.json: all that is needed to build the model again, and what it belongs to."""
    needs, data = model.reads(model.settings), dataclasses.asdict(config.data)
    del data["dir"], data["cache_dir"]
    return {
        "format": MODEL_FORMAT,
        "name": config.model.name,
        "tasks": list(task_names(model)),
        "settings": dataclasses.asdict(config.model),
        "data": data,
        "counts": {**counts_of(folder.manifest), "vocab_size": model.world.vocab_size},
        "precision": config.run.precision,
        "manifest_hash": folder.manifest.hash,
        "split_fingerprint": folder.manifest.fingerprint,
        "reads": what_is_read(needs | model.may_read, folder),
        **({"cf_sha256": folder.cf_digest} if needs & {"cf", "cf_users"} else {}),
    }


def is_model(path: Path) -> bool:
    return (path / DOCUMENT).is_file() or (path / OLD_DOCUMENT).is_file()


def document_path(path: Path) -> Path:
    """model.json of a RUN/model folder, or gensr.json of an older one."""
    return path / DOCUMENT if (path / DOCUMENT).is_file() else path / OLD_DOCUMENT


def read_model_document(path: str | Path) -> dict[str, Any]:
    """model.json of a RUN/model folder; of an older one (gensr.json) the same content. Raises RunError when
    the folder holds no model, DataError when a file of it is not the one that was written."""
    path = Path(path)
    if not is_model(path):
        run = RunFolder(path.parent)
        standing = run.standing()
        fix = (
            f"{standing[0].upper()}{standing[1:]}. Continue it with: gensr train "
            f"{shlex.quote(str(run.config))} --resume auto"
            if standing and run.config.is_file()
            else "Train one with: gensr train"
        )
        raise RunError(f"{path} holds no trained model ({DOCUMENT} is missing). {fix}")
    check_sealed(path)
    document = read_json(document_path(path))
    if document.get("format") == 1:
        return _from_format_1(document)
    if document.get("format") != MODEL_FORMAT:
        raise RunError(
            f"{document_path(path)}: model format {document.get('format')}, this gensr reads 1 and "
            f"{MODEL_FORMAT}"
        )
    return document


def _from_format_1(old: dict[str, Any]) -> dict[str, Any]:
    """Of a GenSR that was saved before there were other models. Its counts are those of its tables."""
    given = old["settings"]
    of_data = ("history_max", "history_tokens", "item_tokens", "weight_rec", "weight_src")
    skipped = {*of_data, "cf_dim", "num_words"}
    settings = {key: value for key, value in given.items() if key not in skipped}
    lora = {"lora": old["lora"]} if old["lora"] else {}
    return {
        **old,
        "name": "gensr",
        "settings": {"name": "gensr", "backbone": old["backbone"], **settings, **lora},
        "data": {key: given[key] for key in of_data},
        "counts": {"num_words": given["num_words"], "vocab_size": old["vocab_size"]},
        "precision": "fp32",
    }


def load_model(
    path: str | Path, tables: ItemTables, device: str = "cpu", folder: PreparedFolder | None = None
) -> Ranker:
    """The model of a RUN/model folder, in evaluation mode, ready to serve. Raises RunError when the folder is
    not one."""
    path = Path(path)
    document = read_model_document(path)
    config = config_from_dict({"model": document["settings"]})
    counts = {
        "num_users": len(tables.cf_users),
        "num_items": tables.num_items,
        "num_queries": len(tables.query_tokens),
        "num_categories": 0,
        **document["counts"],
    }
    world = saved_world(path, counts, DataConfig(**document["data"]), document["precision"], tables, folder)
    model = model_class(document["name"])(config.model, world)
    if "tasks" in document:  # models of before it was noted serve all tasks of their kind
        model.set_tasks(tuple(TASKS.index(name) for name in document["tasks"]))
    state = load_file(path / WEIGHTS)
    missing, unexpected = model.saved_names() - set(state), set(state) - set(model.state_dict())
    if missing or unexpected:
        raise RunError(
            f"{path / WEIGHTS} does not fit the model: missing {sorted(missing)[:5]}, unexpected "
            f"{sorted(unexpected)[:5]}"
        )
    model.load_state_dict(state, strict=False)
    model.ready_to_serve()
    model.set_tables(tables.to(device))
    return model.to(device).eval()


def check_config(document: dict[str, Any], config: Config, where: Path) -> None:
    """Raises RunError when RUN/config.yaml, which says how events are read, is not that of the model beside
    it. document: its model.json; what an older one does not say is not compared."""
    now = {"model": dataclasses.asdict(config.model), "data": dataclasses.asdict(config.data)}
    then = {"model": document["settings"], "data": document["data"]}
    was, is_now = flat_as_json(then), flat_as_json(now)
    shared = {*was} & {*is_now}
    if wrong := [one for one in changes(was, is_now, ignore=FREE_KEYS) if one.key in shared]:
        shown = ", ".join(f"{one.key}={one.now} (was {one.was})" for one in wrong[:4])
        raise RunError(
            f"{where} has changed since the model was trained: {shown}. Restore it, or train again with the "
            "other settings"
        )


def load_run_config(run_dir: str | Path, data_dir: str | Path = "") -> Config:
    """RUN/config.yaml, with another data.dir if one is given. Raises RunError when the folder holds no run,
    or its data.dir is a command."""
    config = RunFolder(run_dir).read_config()
    if data_dir:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(data_dir)))
    refuse_command(config.data.dir, RunFolder(run_dir).config, "data.dir")
    return config


def load_run_model(
    run_dir: str | Path, device: str = "cpu", data_dir: str | Path = ""
) -> tuple[Ranker, Config, PreparedFolder]:
    """The trained model of a run with the tables of the data it was trained on. data_dir: where its prepared
    folder lies now; default: the run's data.dir. Raises when the prepared folder has changed since."""
    config = load_run_config(run_dir, data_dir)
    if not is_url(config.data.dir) and not Path(config.data.dir).is_dir():
        raise RunError(
            f"{run_dir}: its prepared folder {config.data.dir} is not there. If it has moved, "
            f"set data.dir in {RunFolder(run_dir).config} (recommend, search, serve, ui: or give --data)"
        )
    folder = PreparedFolder.open(config.data)
    path = RunFolder(run_dir).model
    document = read_model_document(path)
    check_config(document, config, RunFolder(run_dir).config)
    kind = model_class(document["name"])
    needs = kind.reads(config.model)
    check_data(document, needs, folder, path, str(run_dir), kind.may_read)
    tables = folder.tables(needs)
    return load_model(path, tables, device, folder), config, folder
