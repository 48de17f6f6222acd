"""Post-norm transformer layers over lists that are padded at the end, and who sees whom in them."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers.attention import Attention
from trainer.models.layers.dropout import Dropout

RECBOLE_EPS = 1e-12  # of every LayerNorm there


class PostNormLayer(nn.Module):
    """LN(x + attention), with `cross` LN(· + attention to a memory), LN(· + feed-forward)."""

    def __init__(
        self,
        width: int,
        heads: int,
        ffn: int,
        dropout: float,
        attention_dropout: float,
        inner_dropout: float,
        activation: Literal["gelu", "relu", "leaky_relu"],
        eps: float,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, attention_dropout)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.cross = Attention(width, heads, attention_dropout) if cross else None
        self.cross_norm = nn.LayerNorm(width, eps=eps) if cross else None
        self.inner, self.outer = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.inner_dropout, self.dropout = Dropout(inner_dropout), Dropout(dropout)
        # the exact gelu, by erf; the slope of leaky_relu is .01
        activations: dict[str, Callable[[Tensor], Tensor]]
        activations = {"gelu": F.gelu, "relu": F.relu, "leaky_relu": F.leaky_relu}
        self.activation = activations[activation]
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(
        self,
        x_BND: Tensor,
        visible_BNN: Tensor,
        memory_BMD: Tensor | None = None,
        memory_visible_BNM: Tensor | None = None,
    ) -> Tensor:
        """visible: bool, True where the row's position may look at the column's."""
        x = self.attention_norm(x_BND + self.dropout(self.attention(x_BND, x_BND, visible_BNN)))
        if self.cross is not None and self.cross_norm is not None:
            attended = self.cross(x, memory_BMD, memory_visible_BNM)
            x = self.cross_norm(x + self.dropout(attended))
        inner = self.inner_dropout(self.activation(self.inner(x)))
        out: Tensor = self.norm(x + self.dropout(self.outer(inner)))
        return out


def run_layers(layers: nn.ModuleList, x_BND: Tensor, visible: Tensor, *memory: Tensor) -> Tensor:
    """x through one layer after the other; all see the same."""
    for layer in layers:
        x_BND = layer(x_BND, visible, *memory)
    return x_BND


def recbole_layer(
    width: int, heads: int, ffn: int, dropout: float, attention_dropout: float
) -> PostNormLayer:
    """The block of SASRec and BERT4Rec as RecBole builds it."""
    return PostNormLayer(width, heads, ffn, dropout, attention_dropout, 0.0, "gelu", RECBOLE_EPS)


def torch_layer(width: int, heads: int, ffn: int, dropout: float, cross: bool = False) -> PostNormLayer:
    """nn.TransformerEncoderLayer, or with `cross` nn.TransformerDecoderLayer, with torch's defaults."""
    return PostNormLayer(width, heads, ffn, dropout, dropout, dropout, "relu", eps=1e-5, cross=cross)


def causal(mask_BN: Tensor) -> Tensor:
    """[B, N, N]: position i sees the real positions j ≤ i."""
    past_NN = torch.ones(mask_BN.shape[1], mask_BN.shape[1], dtype=torch.bool, device=mask_BN.device).tril()
    return past_NN & mask_BN[:, None]


def last_step(x_BND: Tensor, length_B: Tensor) -> Tensor:
    """The vector at each row's last real step, [B, D]; the first step's where the row is empty."""
    last_B11 = (length_B - 1).clamp(min=0)[:, None, None].expand(-1, 1, x_BND.shape[2])
    return x_BND.gather(1, last_B11)[:, 0]


def init_normal(module: nn.Module) -> None:
    """RecBole's start, for module.apply: linear maps from N(0, .02²), biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
