"""A batch's history as models of sequences read it: ids (0 = padding, item r is r + 1), the kinds of clicks
that they know, at the length that they have positions for."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data_shards import settings as s
from trainer.batch import Batch
from trainer.config import ModelSettings

HistoryKind = Literal["all", "rec"]


@s.settings
class HistorySettings(ModelSettings):
    history: HistoryKind = "all"
    """clicks that are read: all, or those of recommendations only, as in the paper. On a joint log the latter
    starves the model"""


def history_ids(batch: Batch, kind: HistoryKind, length: int) -> Tensor:
    """Clicked items, oldest first, padded at the end, the newest `length` of them: [B, N] with 1 ≤ N ≤
    length."""
    return newest(slot_ids(batch), kept_slots(batch, kind), length)


def slot_ids(batch: Batch) -> Tensor:
    """Ids of all clicks of the history where they stand [B, N]; 0 for padding."""
    return (batch.history_items + 1) * batch.history_mask


def kept_slots(batch: Batch, kind: HistoryKind) -> Tensor:
    """Slots of a history that are read, [B, N] bool: all clicks, or those of recommendations."""
    return batch.history_mask if kind == "all" else batch.browsed


def newest(ids_BN: Tensor, kept_BN: Tensor, length: int) -> Tensor:
    """The last `length` kept ids of each row, in their order, padded at the end with 0; at least one
    column."""
    packed = pack(ids_BN, kept_BN)
    missing = max(1 - packed.shape[1], 0)
    packed = F.pad(packed, (0, missing))
    if packed.shape[1] <= length:
        return packed
    first_B1 = (kept_BN.sum(1, keepdim=True) - length).clamp(min=0)
    return packed.gather(1, first_B1 + torch.arange(length, device=packed.device))


def pack(values: Tensor, kept_BN: Tensor) -> Tensor:
    """Kept slots first, in their order, then 0: values [B, N] or [B, N, D]."""
    order_BN = (~kept_BN).to(torch.int8).argsort(dim=1, stable=True)
    kept = kept_BN.gather(1, order_BN)
    if values.dim() == 3:
        return values.gather(1, order_BN[..., None].expand_as(values)) * kept[..., None]
    return values.gather(1, order_BN) * kept


def sessions(src_BN: Tensor, queries_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of clicks for one known query: slots that begin one [B, N], and pairs in the same run
    [B, N, N]."""
    again_BN = src_BN[:, 1:] & src_BN[:, :-1] & (queries_BN[:, 1:] >= 0)
    again_BN = again_BN & (queries_BN[:, 1:] == queries_BN[:, :-1])
    first_BN = src_BN & ~F.pad(again_BN, (1, 0))
    number_BN = first_BN.cumsum(1)
    same_BNN = (number_BN[:, :, None] == number_BN[:, None]) & src_BN[:, :, None] & src_BN[:, None]
    return first_BN, same_BNN


def session_means(items_BND: Tensor, same_BNN: Tensor) -> Tensor:
    """Mean of the items of each slot's session [B, N, D], `same` of sessions(); 0 for a slot of none."""
    return same_BNN.to(items_BND.dtype) @ items_BND / same_BNN.sum(2, keepdim=True).clamp(min=1)


def ages(mask_BN: Tensor) -> Tensor:
    """How many newer clicks a history has [B, N], 0 = the newest; 0 for padding."""
    place_N = torch.arange(mask_BN.shape[1], device=mask_BN.device)
    return (mask_BN.sum(1, keepdim=True) - 1 - place_N).clamp(min=0)


def left_padded(ids_BN: Tensor, length: int) -> Tensor:
    """Ids that are padded at the end → padded in front, [B, length]; N ≤ length."""
    wide = F.pad(ids_BN, (0, length - ids_BN.shape[1]))
    shift_B1 = (wide != 0).sum(1, keepdim=True) - length
    return wide.gather(1, (torch.arange(length, device=wide.device) + shift_B1) % length)


def clicked_ids(batch: Batch) -> Tensor:
    """Id of each event's clicked item [B], in a batch with labels."""
    return batch.clicked + 1
