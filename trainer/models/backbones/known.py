"""Shapes of published backbones, so that sizes are known without network and weights."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError

T5_TOKENS = 32128

T5_FAMILY = {
    "model_type": "t5",
    "vocab_size": T5_TOKENS,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}


def _t5(width: int, ff: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        **T5_FAMILY,
        "d_model": width,
        "d_ff": ff,
        "d_kv": 64,
        "num_heads": heads,
        "num_layers": layers,
        "num_decoder_layers": layers,
    }


def _decoder(
    family: str,
    vocab: int,
    width: int,
    ff: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    tied: bool = True,
) -> dict[str, Any]:
    return {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
    }


# config.json of published backbones, as far as sizes depend on it: no network and no weights are needed for a
# plan
KNOWN_BACKBONES: dict[str, dict[str, Any]] = {
    "google/flan-t5-small": _t5(512, 1024, 6, 8),
    "google/flan-t5-base": _t5(768, 2048, 12, 12),
    "google/flan-t5-large": _t5(1024, 2816, 16, 24),
    "google/flan-t5-xl": _t5(2048, 5120, 32, 24),
    "google/flan-t5-xxl": _t5(4096, 10240, 64, 24),
    "Qwen/Qwen2.5-0.5B": _decoder("qwen2", 151936, 896, 4864, 24, 14, 2, 64),
    "Qwen/Qwen2.5-1.5B": _decoder("qwen2", 151936, 1536, 8960, 28, 12, 2, 128),
    "Qwen/Qwen2.5-7B": _decoder("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, tied=False),
    "Qwen/Qwen3-0.6B": _decoder("qwen3", 151936, 1024, 3072, 28, 16, 8, 128),
    "Qwen/Qwen3-1.7B": _decoder("qwen3", 151936, 2048, 6144, 28, 16, 8, 128),
    "Qwen/Qwen3-4B": _decoder("qwen3", 151936, 2560, 9728, 36, 32, 8, 128),
    "meta-llama/Llama-3.2-1B": _decoder("llama", 128256, 2048, 8192, 16, 32, 8, 64),
    "meta-llama/Llama-3.2-3B": _decoder("llama", 128256, 3072, 8192, 28, 24, 8, 128),
    "meta-llama/Llama-3.1-8B": _decoder("llama", 128256, 4096, 14336, 32, 32, 8, 128, tied=False),
    "HuggingFaceTB/SmolLM2-135M": _decoder("llama", 49152, 576, 1536, 30, 9, 3, 64),
    "HuggingFaceTB/SmolLM2-360M": _decoder("llama", 49152, 960, 2560, 32, 15, 5, 64),
    "HuggingFaceTB/SmolLM2-1.7B": _decoder("llama", 49152, 2048, 8192, 24, 32, 32, 64),
}


@contextmanager
def architecture(name: str) -> Iterator[Path | None]:
    """A folder with the backbone's config.json, or None for one from scratch."""
    if name.startswith("scratch:"):
        yield None
    elif (Path(name) / "config.json").is_file():
        yield Path(name)
    elif name in KNOWN_BACKBONES:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(KNOWN_BACKBONES[name]), encoding="utf-8")
            yield Path(folder)
    else:
        raise ConfigError(
            f"model.backbone={name}: no local folder with a config.json, and no known name. Known: "
            f"{', '.join(KNOWN_BACKBONES)}; or scratch:SIZE. "
            f"Another hub model can be downloaded first, then named by its folder."
        )


def is_tied(name: str) -> bool:
    """Whether the output table is the input table, as the weights have it."""
    if name.startswith("scratch:"):
        return True
    if name in KNOWN_BACKBONES:
        return bool(KNOWN_BACKBONES[name]["tie_word_embeddings"])
    weights, index = Path(name) / "model.safetensors", Path(name) / "model.safetensors.index.json"
    if index.is_file():
        return "lm_head.weight" not in json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if not weights.is_file():
        return True
    from safetensors import safe_open

    with safe_open(str(weights), framework="pt") as file:
        return "lm_head.weight" not in set(file.keys())
