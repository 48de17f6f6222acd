"""Reference weights, inputs and outputs of published models: numbers only, made elsewhere.

The folder is GENSR_ORACLES, or shared/parity beside the project; without it the tests are skipped.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("GENSR_ORACLES") or Path(__file__).parents[3] / "shared" / "parity")
ATOL = 5e-6  # float32, one thread; the references differ from a second implementation by less


@dataclass(frozen=True)
class Oracle:
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    hyper: dict[str, Any]

    def check(self, name: str, actual: Tensor, atol: float = ATOL) -> None:
        """`actual` is the reference's output `name`."""
        expected = self.outputs[name]
        torch.testing.assert_close(
            actual.detach().reshape(expected.shape), expected, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}"
        )


def load(name: str) -> Oracle:
    """Skips the test where the oracle is not at hand."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no oracle {path}: set GENSR_ORACLES to the folder of the reference outputs")
    torch.set_num_threads(1)
    tensors = load_file(path)
    groups = ({k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)} for p in ("w.", "in.", "out."))
    weights, inputs, outputs = groups
    hyper = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["hyper"]
    return Oracle(weights, inputs, outputs, hyper)


def renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """State under our names: each old piece of a name becomes the new one, in the order given."""
    state = {}
    for name, tensor in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    return state


# RecBole's block → layers/sequence.py
RECBOLE_NAMES = {
    "item_embedding.": "items.",
    "position_embedding.": "positions.",
    "trm_encoder.layer.": "layers.",
    "multi_head_attention.LayerNorm": "attention_norm",
    "multi_head_attention.dense": "attention.output",
    "multi_head_attention": "attention",
    "feed_forward.dense_1": "inner",
    "feed_forward.dense_2": "outer",
    "feed_forward.LayerNorm": "norm",
    "LayerNorm": "norm",
}


def sizes_of(oracle: Oracle, item_table: str) -> dict[str, int]:
    """num_items and dim of an item table with a padding row."""
    rows, dim = oracle.weights[item_table].shape
    return {"num_items": rows - 1, "dim": dim}
