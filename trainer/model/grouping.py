"""Which events of a batch the backbone answers together: those of one task and, among searches, with queries of like length, to compute little padding.

Decided on the CPU, before the batch moves to its device: reading lengths from a GPU would make every step wait for it.
"""

import torch
from torch import Tensor

from data_shards.schema import REC, SRC
from trainer.batch import Group

# Searches of a batch go through the backbone in up to so many groups of like query length.
LENGTH_GROUPS = 4
# A group has so many prompts at least: every group is another pass over the weights, and on a GPU thousands of small kernels. On a CPU, with flan-t5's
# tokenizer, the compact prompt, 5 candidates and half searches, padding is 5 % of the tokens at 32 events a batch, below 3 % from 64 on. The GPU's number
# is calculated (benchmarks/roofline.py): from there on kernels take longer than their launches.
PROMPTS_A_GROUP_ON_CPU, PROMPTS_A_GROUP = 40, 320


def group_events(task_B: Tensor, query_length_B: Tensor, num_candidates: int, on_cpu: bool, same_calls: bool) -> tuple[Group, ...]:
    """Every event in one group: the recommendations, then searches from the shortest queries to the longest.

    same_calls: the number of groups follows from the size of the batch alone, as if half were searches. A group without events answers the first event of
    the batch, and its answer does not count.
    """
    searches = (task_B == SRC).nonzero()[:, 0]
    searches = searches[query_length_B[searches].argsort(stable=True)]
    num_prompts = (len(task_B) // 2 if same_calls else len(searches)) * num_candidates
    num_groups = max(min(LENGTH_GROUPS, num_prompts // (PROMPTS_A_GROUP_ON_CPU if on_cpu else PROMPTS_A_GROUP)), 1)
    groups = [Group(REC, (task_B == REC).nonzero()[:, 0], longest=0)]
    groups += [Group(SRC, rows, int(query_length_B[rows[-1:]].sum())) for rows in searches.tensor_split(num_groups)]
    if same_calls:
        nobody = torch.zeros(1, dtype=torch.int64)
        return tuple(group if len(group.rows) else Group(group.task, nobody, longest=0, counts=False) for group in groups)
    return tuple(group for group in groups if len(group.rows))
