"""A ranker's language model: a new one by name, or the one whose weights a saved model holds."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trainer.errors import DataError
from trainer.models.backbones.adapters import keep_frozen_in_bf16
from trainer.models.backbones.backbone import Backbone
from trainer.models.backbones.families import build_backbone
from trainer.models.backbones.frozen import check_frozen
from trainer.models.backbones.known import architecture, is_tied
from trainer.models.backbones.settings import BackboneSettings, LoraConfig
from trainer.models.contract import World


def language_model(
    settings: BackboneSettings, world: World, lora: LoraConfig | None = None, part: str = "backbone"
) -> Backbone:
    """A new model: weights and tokenizer belong together, or DataError. World.saved: its architecture alone,
    the weights are loaded afterwards (with LoRA on a pretrained backbone, its frozen weights by name).

    A pretrained one reads prompts as it read texts: between the special tokens of its tokenizer. Under bf16 a
    new model's frozen weights are kept in bf16.

    part: what the model calls it, also the folder of its configuration (save_extra).
    """
    backbone = _made(settings, world, lora if lora is not None and lora.rank else None, part)
    if world.tokenizer is not None and is_pretrained(settings.backbone):
        backbone.frame_texts(*special_tokens(world.tokenizer()))
    return backbone


def is_pretrained(name: str) -> bool:
    """Whether a backbone's name stands for weights that have read texts before."""
    return not name.startswith("scratch:")


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind a text: T5's [], [</s>], Llama 3's [<|begin_of_text|>], []."""
    text, whole = (tokenizer("Yes", add_special_tokens=given)["input_ids"] for given in (False, True))
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    return [], []


def answer_tokens(tokenizer: Any) -> tuple[int, int]:
    """Token ids of "Yes" and "No". Raises DataError when the tokenizer has no single tokens for them."""
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("Yes", "No"))
    if len(yes) != 1 or len(no) != 1 or yes == no:
        raise DataError(
            f"the tokenizer has no single tokens for 'Yes' and 'No' (got {yes} and {no}). Prepare the folder "
            "with another tokenizer."
        )
    return yes[0], no[0]


def check_own_tokenizer(name: str, tokenizer: Any, is_trained: bool, key: str = "model.backbone") -> None:
    """Raises DataError when a folder's tokenizer is not the one that a pretrained backbone has read texts
    with: its vectors would stand for other tokens. is_trained: the tokenizer was made from the folder's
    texts. key: the setting that names the backbone. A local one without tokenizer.json may have been
    pretrained with any."""
    own = Path(name) / "tokenizer.json"
    if own.is_file():
        differs = Tokenizer.from_file(str(own)).get_vocab() != tokenizer.get_vocab()
    else:
        differs = is_trained and is_pretrained(name) and not own.parent.is_dir()
    if differs:
        raise DataError(
            f"the folder's tokenizer is not that of {key}={name}, whose weights would read other "
            f"tokens. Prepare the folder with the backbone's own tokenizer: tokenizer={name}"
        )


def _made(settings: BackboneSettings, world: World, lora: LoraConfig | None, part: str) -> Backbone:
    name = settings.backbone
    if world.tokenizer is None:  # sizes only: no weights, no network
        with architecture(name) as config_only:
            return build_backbone(
                name,
                vocab_size=world.vocab_size,
                dropout=0.0,
                lora=lora,
                config_only=config_only,
                own_head=not is_tied(name),
            )
    if world.saved is not None:
        only_adapters = adapters_only(name, lora)
        backbone = build_backbone(
            name,
            vocab_size=world.vocab_size,
            dropout=settings.dropout,
            lora=lora,
            config_only=None if only_adapters else world.saved / part,
            own_head=_has_own_head(world.saved, part),
        )
        if only_adapters:
            check_frozen(name, backbone, world.saved, part)
        return backbone
    backbone = build_backbone(
        name,
        vocab_size=world.vocab_size,
        dropout=settings.dropout,
        lora=lora,
        activation_checkpointing=settings.activation_checkpointing,
    )
    if lora is not None and world.precision == "bf16" and not lora.four_bit:
        keep_frozen_in_bf16(backbone)
    if world.vocab_size > backbone.vocab_size:
        raise DataError(
            f"{world.data.dir}: its tokenizer has {world.vocab_size} tokens, backbone {name} embeds "
            f"{backbone.vocab_size}. Prepare the folder with the backbone's own tokenizer: tokenizer={name}"
        )
    return backbone


def adapters_only(name: str, lora: LoraConfig | None) -> bool:
    """Whether RUN/model leaves the frozen backbone out: with LoRA, unless the backbone was made from scratch
    and exists nowhere else."""
    return lora is not None and lora.rank > 0 and is_pretrained(name)


def _has_own_head(saved: Path, part: str) -> bool:
    """Whether the output table is one of its own, as in flan-t5: transformers forgets it when it builds a T5
    from a configuration."""
    from safetensors import safe_open

    with safe_open(str(saved / "model.safetensors"), framework="pt") as file:
        names = list(file.keys())
    return any(name.startswith(f"{part}.") and name.endswith("lm_head.weight") for name in names)
