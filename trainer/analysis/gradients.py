"""Do search and recommendation pull the shared parameters apart? Compares the two tasks' gradients by layer.

cosine                 of the two gradients; below 0 the tasks conflict (Yu et al. 2020, PCGrad, definition 1)
conflicting_share      parameters whose two derivatives have opposite signs, of those where both are not 0
magnitude_ratio        ‖g_search‖ / ‖g_rec‖
magnitude_similarity   2 ‖g_search‖ ‖g_rec‖ / (‖g_search‖² + ‖g_rec‖²): 1 for equal lengths, towards 0 when
                       one task drowns the other (PCGrad, definition 3)
"""

import math
from collections.abc import Callable
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


def compare_gradients(
    module: nn.Module,
    search_loss: Callable[[], Tensor],
    rec_loss: Callable[[], Tensor],
    layer: Callable[[str], str] = layer_of,
) -> list[LayerGradients]:
    """Figures of each layer in the module's order, then of all of them as TOTAL.

    Each closure returns a task's scalar loss of `module` on a batch. Parameters that only one of them reaches
    are not shared and are left out, as are frozen ones. `layer` maps a parameter's name to its row. Dropout
    adds noise of its own: put the module into eval(), or fix the seed inside the closures. Nothing is written
    to .grad. Memory: one gradient of each task. Raises DataError when the tasks share no parameter or a
    gradient is not finite.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    parameters = [parameter for _, parameter in named]
    search, rec = (
        torch.autograd.grad(loss(), parameters, allow_unused=True) for loss in (search_loss, rec_loss)
    )
    layers: dict[str, _Sums] = {}
    total = _Sums()
    for (name, _), of_search, of_rec in zip(named, search, rec, strict=True):
        if of_search is None or of_rec is None:
            continue
        # An embedding with sparse=True has a sparse gradient.
        pair = [g.to_dense() if g.layout != torch.strided else g for g in (of_search, of_rec)]
        if not all(bool(g.isfinite().all()) for g in pair):
            raise DataError(f"{name}: a gradient is not finite. Compare in float32 and on a trained model")
        for sums in (layers.setdefault(layer(name), _Sums()), total):
            sums.add(*pair)
    if not layers:
        raise DataError("search and recommendation share no parameter: there is nothing to compare")
    return [*(sums.figures(name) for name, sums in layers.items()), total.figures(TOTAL)]
