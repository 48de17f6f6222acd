"""Augmentations of a list of ids [B, N] that is padded at the end with 0, with the shares of Xie et al.
("Contrastive Learning for Sequential Recommendation", ICDE 2022)."""

import torch
from torch import Tensor

from trainer.models.layers.history import pack

CROP, MASK, REORDER = 0.6, 0.3, 0.6  # share of a list that stays, is hidden, is shuffled


def augmented(ids_BN: Tensor) -> Tensor:
    """Each row cropped, masked or reordered, at random."""
    choice_B1 = torch.randint(3, (len(ids_BN), 1), device=ids_BN.device)
    either = torch.where(choice_B1 == 0, cropped(ids_BN), masked(ids_BN))
    return torch.where(choice_B1 == 2, reordered(ids_BN), either)


def cropped(ids_BN: Tensor) -> Tensor:
    """A random stretch of 60 % of the list, at least one."""
    inside_BN, _, _ = _stretch(ids_BN, CROP)
    return pack(ids_BN, inside_BN)


def masked(ids_BN: Tensor) -> Tensor:
    """Ids become 0 with probability .3, each where it stands."""
    return ids_BN * (torch.rand(ids_BN.shape, device=ids_BN.device) >= MASK)


def reordered(ids_BN: Tensor) -> Tensor:
    """A random stretch of 60 % of the list in random order."""
    inside_BN, start_B1, length_B1 = _stretch(ids_BN, REORDER)
    place_BN = torch.arange(ids_BN.shape[1], device=ids_BN.device).float().expand(ids_BN.shape)
    shuffled_BN = start_B1 + torch.rand(ids_BN.shape, device=ids_BN.device) * length_B1
    return ids_BN.gather(1, torch.where(inside_BN, shuffled_BN, place_BN).argsort(dim=1, stable=True))


def _stretch(ids_BN: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """A random stretch of each list: where it is [B, N], its start and its length [B, 1]."""
    real_B1 = (ids_BN != 0).sum(1, keepdim=True)
    length_B1 = (real_B1 * share).ceil().long()
    draws_B1 = torch.rand(real_B1.shape, device=ids_BN.device)
    start_B1 = (draws_B1 * (real_B1 - length_B1 + 1)).long().minimum(real_B1 - length_B1)
    place_N = torch.arange(ids_BN.shape[1], device=ids_BN.device)
    return (place_N >= start_B1) & (place_N < start_B1 + length_B1), start_B1, length_B1
