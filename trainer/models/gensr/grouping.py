"""Which events of a batch the backbone answers together: those of one task and, among searches, with queries
of similar length, so that little padding is computed. Where there are so few tokens that a GPU waits for
launches, an encoder-decoder answers all groups in one pass, padded to the longest prompt.

Decided on the CPU, before the batch moves to its device: reading lengths from a GPU would make every step
wait for it.
"""

import torch
from torch import Tensor

from data_shards.schema import REC, SRC
from trainer.batch import Group

# Searches of a batch go through the backbone in at most this many groups of similar query length.
LENGTH_GROUPS = 4
# One more group for every so many prompts: each is another pass over the weights, and on a GPU thousands of
# small kernels. With flan-t5's tokenizer, the compact prompt, 5 candidates and half searches, padding is then
# on a CPU 4.4 % of the tokens at 32 events a batch and 2 % from 64 on. The GPU's number is calculated
# (benchmarks/roofline.py): from there on kernels take longer than their launches.
PROMPTS_A_GROUP_ON_CPU, PROMPTS_A_GROUP = 40, 320
# Up to so many tokens are one pass: there a pass of flan-t5-base takes longer to launch than to compute
# (benchmarks/roofline.py). A CPU launches at once.
ONE_PASS_TOKENS_ON_CPU, ONE_PASS_TOKENS = 0, 8192


def in_one_pass(num_prompts: int, template_length: int, on_cpu: bool) -> bool:
    """From the size of a batch alone, so that all ranks decide alike. template_length: tokens of the longest
    template, without query."""
    return num_prompts * template_length <= (ONE_PASS_TOKENS_ON_CPU if on_cpu else ONE_PASS_TOKENS)


def group_events(
    task_B: Tensor, query_length_B: Tensor, num_candidates: int, on_cpu: bool, same_calls: bool
) -> tuple[Group, ...]:
    """Every event in one group: the recommendations, then searches from the shortest queries to the longest.

    same_calls: the number of groups follows from the size of the batch alone, as if half were searches. A
    group without events answers the first event of the batch, and its answer does not count.
    """
    searches = (task_B == SRC).nonzero()[:, 0]
    lengths, order = query_length_B[searches].sort(stable=True)
    num_prompts = (len(task_B) // 2 if same_calls else len(searches)) * num_candidates
    num_groups = max(
        min(LENGTH_GROUPS, num_prompts // (PROMPTS_A_GROUP_ON_CPU if on_cpu else PROMPTS_A_GROUP)), 1
    )
    groups = [Group(REC, (task_B == REC).nonzero()[:, 0], longest=0)]
    groups += [
        Group(SRC, rows, int(query_length_B[rows[-1:]].sum()))
        for rows in searches[order].tensor_split(least_padding(lengths, num_groups))
    ]
    if same_calls:
        nobody = torch.zeros(1, dtype=torch.int64)
        return tuple(
            group if len(group.rows) else Group(group.task, nobody, longest=0, counts=False)
            for group in groups
        )
    return tuple(group for group in groups if len(group.rows))


def least_padding(lengths: Tensor, num_groups: int) -> list[int]:
    """Where to cut ascending lengths so that groups, each padded to its longest, hold the fewest positions:
    num_groups − 1 indices. Groups may be empty."""
    if num_groups == 1 or not len(lengths):
        return [0] * (num_groups - 1)
    up_to = lengths.bincount().cumsum(0)  # [V] how many are at most so long
    longer_than = torch.cat([up_to.new_zeros(1), up_to[:-1]])  # [V] index of the first of each length
    value = torch.arange(len(up_to))
    # positions of a group that holds the lengths u … v
    cost_VV = ((up_to[None] - longer_than[:, None]) * value[None]).double()
    cost_VV[value[:, None] > value[None]] = torch.inf
    # least_V[v]: positions of all groups so far, when the last ends with length v
    least_V, starts = cost_VV[0], []
    for _ in range(num_groups - 1):
        # row u: the next group begins with length u; 0: it is empty
        with_one_more_VV = torch.cat([least_V[None], least_V[:-1, None] + cost_VV[1:]])
        least_V, start_V = with_one_more_VV.min(0)
        starts.append(start_V)
    cuts, end, last = [], len(lengths), len(up_to) - 1
    for start_V in reversed(starts):
        begin = int(start_V[last])
        if begin:  # else the group is empty
            end, last = int(longer_than[begin]), begin - 1
        cuts.append(end)
    return cuts[::-1]
