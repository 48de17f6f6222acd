"""Building a GenSR, saving it to RUN/model, and getting it back. No pickle: safetensors, JSON and a tokenizer
file.

model/  model.safetensors  gensr.json  backbone/config.json  tokenizer/tokenizer.json  [adapter: with LoRA the backbone's frozen weights stay out]
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from data_shards.schema import Manifest, read_manifest
from data_shards.secrets import mask_secrets
from data_shards.settings import read_yaml
from trainer.batch import ItemTables
from trainer.config import Config, LoraConfig, config_from_dict
from trainer.data.cf_table import cf_path, load_cf
from trainer.data.item_tables import load_tables
from trainer.data.node_cache import local_folder, refuse_command
from trainer.errors import DataError, RunError
from trainer.models.backbones.adapters import keep_frozen_in_bf16, merge_adapters
from trainer.models.backbones.backbone import Backbone
from trainer.models.backbones.families import build_backbone
from trainer.models.gensr.model import GenSR, GenSRSettings
from trainer.models.gensr.prompt import NUM_EXTENDED_SLOTS, NUM_PAPER_SLOTS, build_templates
from trainer.runtime.files import file_sha256

MODEL_FORMAT = 1


def model_settings(config: Config, num_words: int, cf_dim: int) -> GenSRSettings:
    model, data = config.model, config.data
    return GenSRSettings(
        variant=model.variant,
        prompt=model.prompt,
        cf_dim=cf_dim,
        num_heads=model.num_heads,
        dropout=model.dropout,
        history_max=data.history_max,
        history_tokens=data.history_tokens,
        item_tokens=data.item_tokens,
        num_words=num_words,
        words_dim=model.words_dim,
        temperature=model.temperature,
        contrastive_weight=model.contrastive_weight,
        listwise_weight=model.listwise_weight,
        weight_rec=data.weight_rec,
        weight_src=data.weight_src,
    )


def build_model(config: Config, manifest: Manifest, tables: ItemTables, folder: str | Path) -> GenSR:
    """A GenSR to train: backbone from config.model.backbone, tokenizer from the prepared folder."""
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    lora = config.model.lora
    backbone = build_backbone(
        config.model.backbone,
        vocab_size=len(tokenizer),
        dropout=config.model.dropout,
        lora=lora if lora.rank else None,
        activation_checkpointing=config.model.activation_checkpointing,
    )
    vocab = backbone.vocab_size
    if len(tokenizer) > vocab:
        raise DataError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, backbone {config.model.backbone} embeds "
            f"{vocab}. "
            f"Prepare the folder with the backbone's own tokenizer: tokenizer={config.model.backbone}"
        )
    if lora.rank and config.run.precision == "bf16" and not lora.four_bit:
        keep_frozen_in_bf16(backbone)
    if config.model.compile:
        backbone.compile_layers()
    return assemble(
        model_settings(config, manifest.num_words, tables.cf.shape[1]), backbone, tokenizer, tables
    )


def assemble(settings: GenSRSettings, backbone: Backbone, tokenizer: Any, tables: ItemTables) -> GenSR:
    num_slots = NUM_EXTENDED_SLOTS if settings.variant == "extended" else NUM_PAPER_SLOTS
    templates = build_templates(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        settings.prompt,
        num_slots,
        backbone.shared_first,
    )
    return GenSR(settings, backbone, templates, answer_tokens(tokenizer), tables)


def load_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{file}: missing. Prepare the folder again.")
    # as it is: naming special tokens would add those that a family does not have
    return PreTrainedTokenizerFast(tokenizer_file=str(file))


def answer_tokens(tokenizer: Any) -> tuple[int, int]:
    """Token ids of "Yes" and "No". Raises DataError when the tokenizer cannot tell them apart by one token."""
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("Yes", "No"))
    if len(yes) != 1 or len(no) != 1 or yes == no:
        raise DataError(
            f"the tokenizer has no single tokens for 'Yes' and 'No' (got {yes} and {no}). Prepare the folder "
            "with another tokenizer."
        )
    return yes[0], no[0]


def trained_state(model: GenSR, full_state: dict[str, Tensor], adapter_only: bool) -> dict[str, Tensor]:
    """What RUN/model holds of a (consolidated) state dict: each tied tensor once; with LoRA no frozen
    weights, if they can be had again by name."""
    names = {
        name for name, parameter in model.named_parameters() if parameter.requires_grad or not adapter_only
    }
    return {name: full_state[name].detach().contiguous().cpu() for name in sorted(names)}


def is_adapter_only(backbone: str, lora: LoraConfig | None) -> bool:
    """Whether RUN/model leaves the frozen backbone out: with LoRA, unless the backbone was made from nothing
    and exists nowhere else."""
    return lora is not None and lora.rank > 0 and not backbone.startswith("scratch:")


def save_model(
    path: str | Path,
    model: GenSR,
    full_state: dict[str, Tensor],
    config: Config,
    manifest: Manifest,
    folder: str | Path,
) -> None:
    """Write RUN/model atomically. `full_state` is the consolidated state dict (accelerator.get_state_dict);
    `model` the unwrapped module."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    adapter_only = is_adapter_only(config.model.backbone, config.model.lora)
    save_file(
        trained_state(model, full_state, adapter_only),
        partial / "model.safetensors",
        metadata={"format": "pt"},
    )
    model.backbone.base.config.save_pretrained(partial / "backbone")
    shutil.copytree(Path(folder) / "tokenizer", partial / "tokenizer")
    document = {
        "format": MODEL_FORMAT,
        "settings": dataclasses.asdict(model.settings),
        "backbone": config.model.backbone,
        "lora": dataclasses.asdict(config.model.lora) if config.model.lora.rank else None,
        "vocab_size": model.backbone.vocab_size,
        "manifest_hash": manifest.hash,
        "split_fingerprint": manifest.fingerprint,
        "cf_sha256": file_sha256(cf_path(folder)),
    }
    (partial / "gensr.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    previous = path.with_name(path.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if path.exists():
        os.replace(path, previous)
    os.replace(partial, path)
    shutil.rmtree(previous, ignore_errors=True)


def load_model(path: str | Path, tables: ItemTables, device: str = "cpu") -> GenSR:
    """The model of a RUN/model folder, in evaluation mode, LoRA adapters merged into the weights. Raises
    RunError when the folder is not one."""
    path = Path(path)
    if not (path / "gensr.json").is_file():
        raise RunError(f"{path} holds no trained model (gensr.json is missing). Train one with: gensr train")
    document = json.loads((path / "gensr.json").read_text(encoding="utf-8"))
    if document["format"] != MODEL_FORMAT:
        raise RunError(f"{path}: model format {document['format']}, this gensr reads {MODEL_FORMAT}")
    lora = LoraConfig(**document["lora"]) if document["lora"] else None
    adapter_only = is_adapter_only(document["backbone"], lora)
    state = load_file(path / "model.safetensors")
    backbone = build_backbone(
        document["backbone"],
        vocab_size=document["vocab_size"],
        dropout=document["settings"]["dropout"],
        lora=lora,
        config_only=None if adapter_only else path / "backbone",
        own_head=any(name.endswith("lm_head.weight") for name in state),
    )
    model = assemble(
        GenSRSettings(**document["settings"]), backbone, load_tokenizer(path / "tokenizer"), tables
    )
    missing = {name for name, p in model.named_parameters() if p.requires_grad or not adapter_only} - set(
        state
    )
    unexpected = set(state) - set(dict(model.named_parameters()))
    if missing or unexpected:
        raise RunError(
            f"{path}/model.safetensors does not fit the model: missing {sorted(missing)[:5]}, unexpected "
            f"{sorted(unexpected)[:5]}"
        )
    model.load_state_dict(state, strict=False)
    if lora is not None and not lora.four_bit:
        merge_adapters(backbone)
    model.set_tables(tables.to(device))
    return model.to(device).eval()


def load_run_config(run_dir: str | Path) -> Config:
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise RunError(f"{run_dir} is no run folder: config.yaml is missing. Train one with: gensr train")
    config = config_from_dict(read_yaml(path))
    refuse_command(config.data.dir, path)
    return config


def load_run_model(run_dir: str | Path, device: str = "cpu") -> tuple[GenSR, ItemTables, Config, Manifest]:
    """The trained model of a run with the tables of the data it was trained on. Raises when the prepared
    folder has changed since."""
    config = load_run_config(run_dir)
    folder = local_folder(config.data)
    manifest = read_manifest(folder)
    path = Path(run_dir) / "model"
    if (path / "gensr.json").is_file():
        trained_on = json.loads((path / "gensr.json").read_text(encoding="utf-8"))
        if trained_on["split_fingerprint"] != manifest.fingerprint:
            raise DataError(
                f"{mask_secrets(config.data.dir)} has another split (fingerprint {manifest.fingerprint[:12]}) "
                f"than {run_dir} was trained on "
                f"({trained_on['split_fingerprint'][:12]}). Prepare the data as it was, or train again."
            )
        if trained_on["cf_sha256"] != file_sha256(cf_path(folder)):
            raise DataError(
                f"{cf_path(folder)} is not the table {run_dir} was trained on: the model would read other "
                "vectors. Restore it, or train again."
            )
    tables = load_tables(folder, manifest, load_cf(folder, manifest), with_folds=False)
    model = load_model(path, tables, device)
    return model, model.tables, config, manifest
