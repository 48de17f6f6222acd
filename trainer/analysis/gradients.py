"""Do search and recommendation pull the shared parameters apart? Compares the two tasks' gradients by layer.

cosine                 of the two gradients; below 0 the tasks conflict (Yu et al. 2020, PCGrad, definition 1)
conflicting_share      parameters whose two derivatives have opposite signs, of those where both are not 0
magnitude_ratio        ‖g_search‖ / ‖g_rec‖
magnitude_similarity   2 ‖g_search‖ ‖g_rec‖ / (‖g_search‖² + ‖g_rec‖²): 1 for equal lengths, towards 0 when
                       one task drowns the other (PCGrad, definition 3)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.errors import DataError

TOTAL = "total"


@dataclass(frozen=True)
class LayerGradients:
    """One layer, or TOTAL for all parameters that both tasks use. None: a gradient of 0 has no direction."""

    layer: str
    num_parameters: int
    cosine: float | None
    conflicting_share: float | None
    search_norm: float
    rec_norm: float
    magnitude_ratio: float | None
    magnitude_similarity: float | None


@dataclass
class _Sums:
    """What the figures of a layer are made of. Layers add up, so the total needs no second pass."""

    num_parameters: int = 0
    dot: float = 0.0
    search: float = 0.0  # Σ g²
    rec: float = 0.0
    num_opposite: int = 0
    num_active: int = 0  # neither derivative is 0

    def add(self, search: Tensor, rec: Tensor) -> None:
        search, rec = search.double(), rec.double()
        product = search * rec
        self.num_parameters += search.numel()
        self.dot += float(product.sum())
        self.search += float(search.square().sum())
        self.rec += float(rec.square().sum())
        # By signs, not by the product, which underflows to 0 for tiny derivatives of half precision.
        signs = search.sign() * rec.sign()
        self.num_opposite += int((signs < 0).sum())
        self.num_active += int((signs != 0).sum())

    def figures(self, layer: str) -> LayerGradients:
        search_norm, rec_norm = math.sqrt(self.search), math.sqrt(self.rec)
        both = search_norm * rec_norm
        return LayerGradients(
            layer=layer,
            num_parameters=self.num_parameters,
            cosine=max(-1.0, min(1.0, self.dot / both)) if both > 0 else None,
            conflicting_share=self.num_opposite / self.num_active if self.num_active else None,
            search_norm=search_norm,
            rec_norm=rec_norm,
            magnitude_ratio=search_norm / rec_norm if rec_norm > 0 else None,
            magnitude_similarity=2 * both / (self.search + self.rec) if self.search + self.rec > 0 else None,
        )


def layer_of(name: str) -> str:
    """The module that owns a parameter: encoder.block.0.wq.weight → encoder.block.0.wq."""
    return name.rpartition(".")[0] or name


def gradients_of(module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Name → gradient of a scalar loss of `module`, in the module's order, of the trained parameters that it
    reaches. Nothing is written to .grad.

    Dropout adds noise of its own: put the module into eval(), or fix the seed inside the closure."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss(), [parameter for _, parameter in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, found, strict=True) if g is not None}


def compare(
    search: Mapping[str, Tensor], rec: Mapping[str, Tensor], layer: Callable[[str], str] = layer_of
) -> list[LayerGradients]:
    """Figures of each layer in the order of `search`, then of all of them as TOTAL.

    What is in one of the two alone is not shared and is left out. `layer` maps a parameter's name to its row.
    Raises DataError when the tasks share no parameter or a gradient is not finite.
    """
    layers: dict[str, _Sums] = {}
    total = _Sums()
    for name in (name for name in search if name in rec):
        # An embedding with sparse=True has a sparse gradient.
        pair = [g.to_dense() if g.layout != torch.strided else g for g in (search[name], rec[name])]
        if not all(bool(g.isfinite().all()) for g in pair):
            raise DataError(f"{name}: a gradient is not finite. Compare in float32 and on a trained model")
        for sums in (layers.setdefault(layer(name), _Sums()), total):
            sums.add(*pair)
    if not layers:
        raise DataError("search and recommendation share no parameter: there is nothing to compare")
    return [*(sums.figures(name) for name, sums in layers.items()), total.figures(TOTAL)]
