"""Groups of like query length: every event once, the fewest positions, the same number of calls where ranks
need it."""

import itertools

import pytest
import torch
from torch import Tensor

from data_shards.schema import REC, SRC
from trainer.models.gensr.grouping import (
    LENGTH_GROUPS,
    PROMPTS_A_GROUP,
    PROMPTS_A_GROUP_ON_CPU,
    group_events,
    least_padding,
)


def positions(lengths: Tensor, cuts: list[int]) -> int:
    return sum(len(group) * int(group.max()) for group in lengths.tensor_split(cuts) if len(group))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4])
def test_cuts_leave_the_fewest_positions_of_all_cuts(seed: int, num_groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 7, (9,), generator=generator).sort().values
    cuts = least_padding(lengths, num_groups)
    assert len(cuts) == num_groups - 1 and cuts == sorted(cuts)
    every = itertools.combinations_with_replacement(range(len(lengths) + 1), num_groups - 1)
    assert positions(lengths, cuts) == min(positions(lengths, list(others)) for others in every)


@pytest.mark.parametrize("lengths", [[], [3], [2, 2, 2]])
def test_fewer_lengths_than_groups_leave_groups_empty(lengths: list[int]) -> None:
    groups = torch.tensor(lengths, dtype=torch.int64).tensor_split(
        least_padding(torch.tensor(lengths, dtype=torch.int64), 4)
    )
    assert len(groups) == 4 and torch.cat(groups).tolist() == lengths


@pytest.mark.parametrize("same_calls", [False, True])
@pytest.mark.parametrize("num_searches", [0, 1, 30, 64])
def test_every_event_is_answered_once(num_searches: int, same_calls: bool) -> None:
    generator = torch.Generator().manual_seed(num_searches)
    task = torch.where(torch.randperm(64, generator=generator) < num_searches, SRC, REC)
    length = torch.where(task == SRC, torch.randint(1, 9, (64,), generator=generator), 0)
    groups = group_events(task, length, 5, on_cpu=True, same_calls=same_calls)
    counted = [group for group in groups if group.counts]
    assert torch.cat([group.rows for group in counted]).sort().values.tolist() == list(range(64))
    for group in counted:
        assert (task[group.rows] == group.task).all() and group.longest == int(length[group.rows].max())
    if same_calls:
        assert len(groups) == 1 + LENGTH_GROUPS and all(
            group.rows.tolist() == [0] for group in groups if not group.counts
        )
    else:
        assert len(counted) == len(groups)


def test_there_is_a_group_more_for_so_many_prompts() -> None:
    task, length = torch.full((64,), SRC), torch.arange(64) % 9 + 1

    def num_groups(num_candidates: int, on_cpu: bool) -> int:
        return len(group_events(task, length, num_candidates, on_cpu, same_calls=False))

    assert PROMPTS_A_GROUP_ON_CPU < PROMPTS_A_GROUP <= 64 * 100
    assert (num_groups(1, True), num_groups(5, True), num_groups(5, False), num_groups(100, False)) == (
        1,
        4,
        1,
        4,
    )
