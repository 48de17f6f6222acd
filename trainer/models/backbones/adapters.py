"""LoRA and its relatives through peft: adapters on a frozen backbone, which parts stay trainable, merging."""

import importlib.util
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError


def add_adapters(model: Any, lora: Any, default_targets: tuple[str, ...]) -> Any:
    """The model with its weights frozen, adapters on `lora.target_modules`, and the parts of
    `lora.also_train` trainable again.

    Raises ConfigError when the backbone has no such modules.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    wanted = default_targets if lora.target_modules == "auto" else _listed(lora.target_modules)
    targets = [name for name in wanted if name in names]
    if not targets:
        raise ConfigError(
            f"model.lora.target_modules={lora.target_modules}: the backbone has no such modules. It has: "
            f"{', '.join(sorted(names))}"
        )
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    wrapped = get_peft_model(model, config)
    for part in _listed(lora.also_train):
        _train_whole(model, part, names)
    return wrapped


def _train_whole(model: Any, part: str, names: set[str]) -> None:
    tables = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    if part not in tables and part not in names:
        raise ConfigError(
            f"model.lora.also_train={part}: the backbone has no such part. It has embeddings, head, and: "
            f"{', '.join(sorted(names))}"
        )
    modules = (
        [tables[part]]
        if part in tables
        else [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == part]
    )
    for module in modules:
        module.requires_grad_(True)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def keep_frozen_in_bf16(backbone: Any) -> None:
    """Frozen linear maps in bf16, in place: what autocast casts them to at every use, in 2 bytes a weight
    instead of 4 and 2 more for the copy.

    The table of answers stays as it is: it is read in float32.
    """
    head = backbone.base.get_output_embeddings()
    for module in backbone.modules():
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad:
            module.to(torch.bfloat16)


def merge_adapters(backbone: Any) -> None:
    """Fold the adapters into the weights, in place: the same scores without the adapters' work. A backbone
    without adapters stays as it is."""
    if hasattr(backbone.model, "merge_and_unload"):
        backbone.model = backbone.model.merge_and_unload(safe_merge=True)


def four_bit_config(lora: Any) -> dict[str, Any]:
    """Arguments of from_pretrained for a frozen base in 4 bits (QLoRA); {} when it is not asked for.

    Raises ConfigError where the platform cannot: it takes bitsandbytes and a CUDA device.
    """
    if lora is None or not lora.four_bit:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.lora.four_bit=true needs bitsandbytes, which is not installed: pip install bitsandbytes, "
            "or four_bit=false"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "model.lora.four_bit=true needs a CUDA device, and there is none here. Set "
            "model.lora.four_bit=false"
        )
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}
