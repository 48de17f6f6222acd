"""Tables of neighbours of items: [I, M] item rows, ascending, I = none, and a value beside each. How they
are counted from clicks, and how a value is found again."""

from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from data_shards.histories import first_of_runs, in_histories
from data_shards.schema import REC
from trainer.batch import TrainClicks
from trainer.models.contract import Report, World

ROWS_AT_ONCE = 4096  # items whose neighbours are counted together
ROUNDING = 1e-6  # of similarities that are equal


def click_matrix(clicks: TrainClicks, which: str, world: World) -> sparse.csr_matrix:
    """[num_users, num_items], 1 where a user clicked an item in the training split."""
    counted = (clicks.task == REC) if which == "rec" else torch.ones_like(clicks.task, dtype=torch.bool)
    user, item = (column[counted].numpy() for column in (clicks.user, clicks.item))
    shape = (world.num_users, world.num_items)
    matrix = sparse.csr_matrix((np.ones(len(user), np.float32), (user, item)), shape=shape)
    matrix.data[:] = 1.0  # csr adds up repeated clicks
    return matrix


def click_sequences(clicks: TrainClicks, which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user, item, place where its moment begins) of each click that histories show, by user and time."""
    counted = (clicks.task == REC) if which == "rec" else clicks.task >= 0
    user, item, time, task = (
        column[counted].numpy() for column in (clicks.user, clicks.item, clicks.time, clicks.task)
    )
    kept = in_histories(user, time, item, task)
    moment = first_of_runs(user[kept], time[kept]).cumsum()
    return user[kept], item[kept], np.searchsorted(moment, moment)


def common_users(
    clicked_IU: sparse.csr_matrix, report: Report
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(item, another item, how many users clicked both) of every pair with such a user, block by block of
    items. clicked_IU: 1 where a user clicked an item. report: see World."""
    items = np.flatnonzero(np.diff(clicked_IU.indptr))  # with clicks: in a large catalogue, a part of it
    clicked_NU = clicked_IU[items]
    clicked_UN = clicked_NU.T.tocsr()  # once: each product would convert it
    for start in range(0, len(items), ROWS_AT_ONCE):
        common = (clicked_NU[start : start + ROWS_AT_ONCE] @ clicked_UN).tocoo()
        row, other = items[common.row + start], items[common.col]
        keep = row != other
        yield row[keep], other[keep], common.data[keep]
        report("common users", min(start + ROWS_AT_ONCE, len(items)), len(items))


def followers(
    user: np.ndarray, item: np.ndarray, start: np.ndarray, num_items: int, steps: int, step_decay: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(item a, item b, n(a → b), T(a → b)) of every pair whose b followed a within `steps` clicks; equations:
    models/baselines/transitions.py. user, item: clicks by user and time; start: where the moment of each
    begins, from which steps are counted back: clicks of one moment are not before each other."""
    counts = sparse.csr_matrix((num_items, num_items), dtype=np.float64)
    for step in range(1, steps + 1):
        before = start - step
        same = (before >= 0) & (user[np.maximum(before, 0)] == user)
        pairs = (item[before[same]], item[same])
        weights = np.full(len(pairs[0]), step_decay ** (step - 1))
        counts += sparse.csr_matrix((weights, pairs), shape=counts.shape)
    found = counts.tocoo()
    other = (found.row != found.col) & (found.data > 0)
    row, col, count = found.row[other].astype(np.int64), found.col[other].astype(np.int64), found.data[other]
    clicks_I = np.bincount(item, minlength=num_items)
    return row, col, count, count / np.sqrt(clicks_I[row] * clicks_I[col])


def keep_nearest(
    neighbours_IM: Tensor,
    value_IM: Tensor,
    row: np.ndarray,
    other: np.ndarray,
    value: np.ndarray,
    by: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write pairs, by row, into both tables: of each row those with the largest `by`, laid out by ascending
    neighbour. Returns the best pair that each row had no room for: row, other, by."""
    room = neighbours_IM.shape[1]
    starts = np.flatnonzero(first_of_runs(row))
    ends = np.append(starts, len(row))[1:]
    full = np.flatnonzero(ends - starts > room)
    kept, refused = np.ones(len(row), bool), []
    # to sort whole rows takes three times as long
    for start, end in zip(starts[full], ends[full], strict=True):
        least = -np.partition(-by[start:end], room)[room]
        found = start + np.flatnonzero(by[start:end] >= least)
        found = found[np.lexsort((other[found], -by[found]))]
        kept[start:end] = False
        kept[found[:room]] = True
        refused.append(found[room])
    next_best = np.array(refused, dtype=np.int64)
    best = np.flatnonzero(kept)
    best = best[np.lexsort((other[best], row[best]))]
    first_refused = row[next_best], other[next_best], by[next_best]
    row, other, value = row[best], other[best], value[best]
    at = (torch.from_numpy(row), torch.from_numpy(np.arange(len(row)) - np.searchsorted(row, row)))
    neighbours_IM[at] = torch.from_numpy(other.astype(np.int32)).to(neighbours_IM.device)
    value_IM[at] = torch.from_numpy(value.astype(np.float32)).to(value_IM.device)
    return first_refused


def looked_up(neighbours_IM: Tensor, value_IM: Tensor, items_BN: Tensor, wanted_BC: Tensor) -> Tensor:
    """The value of each wanted item in the rows of some items, [B, N, C]; 0 where it is not there."""
    rows_BNM = neighbours_IM[items_BN]
    wanted_BNC = wanted_BC[:, None].expand(-1, items_BN.shape[1], -1).to(rows_BNM.dtype).contiguous()
    place_BNC = torch.searchsorted(rows_BNM, wanted_BNC).clamp(max=rows_BNM.shape[2] - 1)
    found_BNC = rows_BNM.gather(2, place_BNC) == wanted_BNC
    return value_IM[items_BN].gather(2, place_BNC) * found_BNC


def write_refused(
    refused_I: Tensor, refused_by_I: Tensor, row: np.ndarray, other: np.ndarray, by: np.ndarray
) -> None:
    """What keep_nearest() had no room for → a table of it, and one of its similarity."""
    at = torch.from_numpy(row)
    refused_I[at] = torch.from_numpy(other.astype(np.int32)).to(refused_I.device)
    refused_by_I[at] = torch.from_numpy(by.astype(np.float32)).to(refused_I.device)


def still_near(
    refused_I: Tensor, refused_by_I: Tensor, items_BN: Tensor, wanted_BC: Tensor, by_BNC: Tensor
) -> Tensor:
    """Whether each wanted item, kept in the rows of some items, would be kept there if its similarity were
    `by`: whether it still comes before the first that found no room. [B, N, C] bool."""
    first_BN1 = refused_I[items_BN][..., None]
    first_by_BN1 = refused_by_I[items_BN][..., None]
    tie_BNC = (by_BNC - first_by_BN1).abs() <= ROUNDING * first_by_BN1
    return torch.where(tie_BNC, wanted_BC[:, None] < first_BN1, by_BNC > first_by_BN1)
