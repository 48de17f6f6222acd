"""The loss of Eq. 8 and its terms. All in float32, whatever the compute precision."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.contract import GatherRows


def answer_loss(scores_BC: Tensor, labels_BC: Tensor, weights_B: Tensor) -> Tensor:
    """Eq. 9 over the two answers: −log P(y | prompt), y = "Yes" for the clicked item and "No" for the others.

    scores are log-odds, log P(Yes) − log P(No), so that −log P(y) is a binary cross-entropy. Mean over
    candidates, weighted mean over events.
    """
    losses_BC = F.binary_cross_entropy_with_logits(scores_BC.float(), labels_BC, reduction="none")
    return weighted_mean(losses_BC.mean(1), weights_B)


def listwise_loss(scores_BC: Tensor, labels_BC: Tensor, weights_B: Tensor) -> Tensor:
    """Softmax cross-entropy of the clicked item against the event's other candidates (extension, not in the
    paper)."""
    return weighted_mean(-(scores_BC.float().log_softmax(1) * labels_BC).sum(1), weights_B)


def contrastive_loss(
    cf_BD: Tensor,
    sem_BD: Tensor,
    users_B: Tensor,
    temperature: float,
    gather: GatherRows | None = None,
    has_history_B: Tensor | None = None,
) -> Tensor:
    """Eq. 10: symmetric InfoNCE between the two views of each user.

        ½ [CE(cos(F_c, F_s)/τ) + CE(cos(F_s, F_c)/τ)]

    Rows of the same user are not negatives of each other; users < 0 (unknown) are all different. With
    `gather` the negatives come from every rank.

    Rows without history (has_history_B: bool; None = all have one) and rows with a view of length 0 are left
    out: all of the former have the same views, and a cosine with 0 has no gradient. They are nobody's
    negatives, and their own loss is 0. The sum is divided by the number of events, as in weighted_mean.
    """
    counted_B = cf_BD.any(1) & sem_BD.any(1)
    if has_history_B is not None:
        counted_B = counted_B & has_history_B
    cf_BD, sem_BD = F.normalize(cf_BD.float(), dim=1), F.normalize(sem_BD.float(), dim=1)
    all_cf, all_sem, all_users, all_counted, offset = cf_BD, sem_BD, users_B, counted_B.long(), 0
    if gather is not None:
        (all_cf, offset), (all_sem, _), (all_users, _) = gather(cf_BD), gather(sem_BD), gather(users_B)
        all_counted, _ = gather(counted_B.long())
    own = torch.arange(len(users_B), device=users_B.device) + offset
    hidden = (users_B[:, None] == all_users[None, :]) & (users_B[:, None] >= 0)
    hidden = hidden | (all_counted == 0)[None, :]
    hidden = hidden & (own[:, None] != torch.arange(len(all_users), device=users_B.device)[None, :])

    def info_nce(queries: Tensor, keys: Tensor) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):  # which would make bf16 of this product
            similarity = (queries @ keys.T / temperature).masked_fill(hidden, float("-inf"))
        losses_B = F.cross_entropy(similarity, own, reduction="none")
        return losses_B.masked_fill(~counted_B, 0.0).mean()

    return 0.5 * (info_nce(cf_BD, all_sem) + info_nce(sem_BD, all_cf))


def weighted_mean(values_B: Tensor, weights_B: Tensor) -> Tensor:
    """Σ w v / B. Divided by the number of events, not by Σ w: micro-batches of equal size then add up to the
    whole batch's gradient."""
    return (values_B * weights_B).mean()
