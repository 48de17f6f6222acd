"""Hard negatives (model.mined_negatives), drawn while training from what retrieval would bring: neighbours
of the history, or, where the query names a category, its items.

A mined negative takes the place of a uniform one. Which one is a hash of the event and of the uniform
negative, so that it depends neither on ranks nor on resumption, and is another in each epoch. An item that
the user has clicked is no negative.

Hard negatives alone teach to tell a click from its neighbours, and to forget the rest. So every candidate's
score is corrected by how likely it was to be drawn (the proposal q): a sampled softmax whose optimum is that
of the whole catalogue (Bengio & Senécal, 2008).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.batch import Batch, ItemTables
from trainer.models.contract import World
from trainer.models.gensr.category_items import CategoryItems
from trainer.models.gensr.evidence import Drawn, Evidence, history_weights, mixed

UNIT_BITS = 24  # of a hash that become a number in [0, 1)


@dataclass(frozen=True)
class Mine:
    """What mined negatives are drawn from beside the neighbours; on one device."""

    clicked: Tensor  # [n] int64, sorted: user · num_items + item of the training clicks
    categories: CategoryItems


def open_mine(world: World, evidence: Evidence) -> Mine:
    clicks = world.clicks()
    clicked = torch.unique(clicks.user * world.num_items + clicks.item)
    return Mine(clicked.to(world.tables.device), CategoryItems.of(world.tables, evidence))


def mined(batch: Batch, count: int, evidence: Evidence, mine: Mine, tables: ItemTables) -> Batch:
    """The batch with its last `count` candidates, where they are negatives, exchanged for mined ones."""
    drawn_BH, is_negative_BH = batch.candidates[:, -count:], batch.labels[:, -count:] == 0
    bits_BH = mixed(mixed(batch.event_id)[:, None] ^ drawn_BH)
    near_BH = _neighbours(batch, evidence, bits_BH)
    of_category_BH = _of_category(batch, mine, tables, bits_BH)
    found_BH = torch.where(of_category_BH >= 0, of_category_BH, near_BH)
    known_BN = torch.where(batch.history_mask, batch.history_items, -1)
    taken = (found_BH[..., None] == known_BN[:, None]).any(-1) | (found_BH < 0)
    taken |= found_BH == batch.clicked[:, None]
    if len(mine.clicked):
        wanted = batch.user[:, None] * tables.num_items + found_BH
        place = torch.searchsorted(mine.clicked, wanted).clamp(max=len(mine.clicked) - 1)
        taken |= mine.clicked[place] == wanted
    candidates = batch.candidates.clone()
    candidates[:, -count:] = torch.where(taken | ~is_negative_BH, drawn_BH, found_BH)
    return batch.with_candidates(candidates, batch.labels)


def log_proposal(
    batch: Batch, drawn: Drawn, share: float, evidence: Evidence, mine: Mine, tables: ItemTables
) -> Tensor:
    """log(q · num_items) of each candidate [B, C]: 0 where only uniform draws can have brought it. share: of
    the negatives that are mined."""
    num_items = tables.num_items
    weight_BN = drawn.weight_BN / drawn.weight_BN.sum(1, keepdim=True).clamp(min=1e-9)
    length_BN = (evidence.near[batch.history_items] < num_items).sum(-1)
    by_near_BC = (drawn.near_BNC * (weight_BN / length_BN.clamp(min=1))[..., None]).sum(1)
    finds_B1 = (weight_BN * (length_BN > 0)).sum(1, keepdim=True)  # else the uniform draw stays
    place_B, known_B = mine.categories.asked(batch, tables)
    if len(mine.categories.key):
        by_category_BC = drawn.in_category_BC / mine.categories.size[place_B][:, None]
        by_near_BC = torch.where(known_B[:, None], by_category_BC, by_near_BC)
        finds_B1 = torch.where(known_B[:, None], 1.0, finds_B1)
    return (1 - share * finds_B1 + share * num_items * by_near_BC).log()


def _neighbours(batch: Batch, evidence: Evidence, bits_BH: Tensor) -> Tensor:
    """A neighbour of a history item, newer ones more often, [B, H]; −1 where it has none."""
    weight_BN, _ = history_weights(batch)
    upto_BN = weight_BN.cumsum(1)
    total_B1 = upto_BN[:, -1:]
    place_BH = torch.searchsorted(upto_BN, _unit(bits_BH) * total_B1, right=True)
    place_BH = place_BH.clamp(max=weight_BN.shape[1] - 1)
    rows_BHM = evidence.near[batch.history_items.gather(1, place_BH)]
    size_BH = (rows_BHM < evidence.near.shape[0]).sum(-1)
    which_BH = (_unit(mixed(bits_BH)) * size_BH).long().clamp(max=rows_BHM.shape[2] - 1)
    found_BH = rows_BHM.gather(2, which_BH[..., None])[..., 0].long()
    return found_BH.masked_fill((size_BH == 0) | (total_B1 == 0), -1)


def _of_category(batch: Batch, mine: Mine, tables: ItemTables, bits_BH: Tensor) -> Tensor:
    """An item of the query's category [B, H]; −1 where it names none."""
    if not len(mine.categories.key):
        return torch.full_like(bits_BH, -1)
    place_B, known_B = mine.categories.asked(batch, tables)
    size_B1 = mine.categories.size[place_B][:, None]
    which_BH = (_unit(mixed(bits_BH ^ 1)) * size_B1).long().minimum(size_B1 - 1)
    place_BH = mine.categories.start[place_B][:, None] + which_BH
    return mine.categories.items[place_BH].masked_fill(~known_B[:, None], -1)


def _unit(bits: Tensor) -> Tensor:
    """[0, 1) float32 from the upper bits."""
    return ((bits >> (63 - UNIT_BITS)) & (2**UNIT_BITS - 1)).float() / 2**UNIT_BITS
