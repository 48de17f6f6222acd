"""Lower bounds of the mutual information I(X; Y), in nats, from a trained critic T(x, y).

    mine      Donsker–Varadhan, Eq. 12 of the paper:  E_joint[T] − log E_marginals[e^T]
              (MINE, Belghazi et al. 2018, with the moving average that corrects the gradient)
    info_nce  E[ T(x_i, y_i) − log (1/N) Σ_j e^T(x_i, y_j) ]   (van den Oord et al. 2018); at most log N

Estimators without a network are in mutual_information_knn.py. The samples are split three ways, whole users
at a time where users are given: one part trains the critic, the second picks the best step and restart, the
third gives the value and its bootstrap interval. On held-out samples the value is a bound; on those that
trained the critic it would grow with the size of the network. A value of 0 without any width says that no
critic beat T = 0: the information is too small to be seen in so few samples.

With a label y the information is at most its entropy, log 2 = 0.693 nats for Yes and No. Divide by log 2 for
bits.

Error on Gaussians of known information, in nats: d pairs of columns with correlation ρ, 4,000 samples,
default settings, mean ± deviation of three seeds. Few samples, many dimensions and much information make the
estimates too small, never much too large:

     d   ρ    truth             mine         info_nce              ksg
     1  .1    0.005   −0.002 ± 0.001   −0.003 ± 0.004   +0.003 ± 0.011
     1  .5    0.144   −0.005 ± 0.007   −0.011 ± 0.012   −0.007 ± 0.013
     1  .9    0.830   −0.003 ± 0.004   −0.007 ± 0.007   +0.005 ± 0.018
     5  .1    0.025   −0.018 ± 0.003   −0.028 ± 0.002   −0.007 ± 0.010
     5  .5    0.719   −0.062 ± 0.057   −0.062 ± 0.047   −0.156 ± 0.012
     5  .9    4.152   −0.408 ± 0.065   −0.255 ± 0.059   −1.072 ± 0.031
    20  .1    0.101   −0.088 ± 0.004   −0.101 ± 0.000   −0.083 ± 0.003
    20  .5    2.877   −1.139 ± 0.102   −0.654 ± 0.089   −2.180 ± 0.004
    20  .9   16.607   −5.835 ± 1.019   −9.729 ± 0.023   −13.23 ± 0.016   (info_nce: ceiling 7.09)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from trainer.errors import DataError
from trainer.evaluation.bootstrap import ANY, cluster_means, interval_ends

NUM_SHUFFLES = 8  # pairs of the marginals for each held-out sample
MAX_CANDIDATES = 2048  # N of InfoNCE on the held-out samples
EMA_RATE = 0.01  # of the mean of e^T, as in the authors' experiments
MIN_SAMPLES = 100
SHARES = (0.5, 0.2)  # training, selection; the rest is held out
NUM_CHECKS = 10  # times that a restart is measured on the selection part

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Mutual information in nats, with a 95 % interval."""

    value: float
    low: float
    high: float
    estimator: str
    num_samples: int  # whose mean the value is
    ceiling: float | None  # the largest value that the estimator can give; None: there is no such limit
    restarts: tuple[float, ...] = ()  # the value of each restart; their spread shows how far to trust it


@dataclass(frozen=True)
class CriticSettings:
    """How a critic is built and trained."""

    hidden: int = 64
    steps: int = 500
    batch_size: int = 256
    lr: float = 2e-3
    restarts: int = 3


class DonskerVaradhan(nn.Module):
    """Eq. 12 with an MLP of both inputs."""

    name: ClassVar[str] = "mine"

    def __init__(self, width_x: int, width_y: int, hidden: int) -> None:
        super().__init__()
        self.critic = _mlp(width_x + width_y, hidden, 1)
        _zero(self.critic[-1])
        self.log_mean_exp: Tensor | None = None  # moving average of E_marginals[e^T], as a logarithm

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        """T of each row, [B]."""
        scores_B: Tensor = self.critic(torch.cat([x_BD, y_BD], dim=1)).squeeze(1)
        return scores_B

    def loss(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        """Its gradient is that of −(Eq. 12). Dividing by the batch's own mean of e^T would bias it (MINE,
        section 3.2), so a moving average stands in its place."""
        joint = self(x_BD, y_BD).mean()
        shift = 1 + int(torch.randint(len(x_BD) - 1, (1,)))  # no row meets its own y
        log_mean = self(x_BD, y_BD.roll(shift, dims=0)).logsumexp(0) - math.log(len(x_BD))
        new, old = log_mean.detach(), self.log_mean_exp
        self.log_mean_exp = (
            new if old is None else torch.logaddexp(old + math.log1p(-EMA_RATE), new + math.log(EMA_RATE))
        )
        return (log_mean - self.log_mean_exp).exp() - joint

    def terms(self, x_ND: Tensor, y_ND: Tensor) -> Floats:
        """T(x_i, y_i) and the mean of e^T(x_i, y_j) over NUM_SHUFFLES other j, [N, 2] float64."""
        steps = np.unique(np.linspace(1, len(x_ND) - 1, NUM_SHUFFLES).astype(int))
        marginal = torch.stack([self(x_ND, y_ND.roll(int(step), dims=0)) for step in steps]).double()
        return torch.stack([self(x_ND, y_ND).double(), marginal.exp().mean(0)], dim=1).cpu().numpy()

    @staticmethod
    def value(means: Floats) -> Floats:
        """Means of terms, [..., 2] → the bound, [...]."""
        return means[..., 0] - np.log(np.maximum(means[..., 1], np.finfo(np.float64).tiny))

    @staticmethod
    def ceiling(num_samples: int) -> float | None:
        return None


class InfoNCE(nn.Module):
    """Scores are inner products of two encoders, so all N² pairs cost one product."""

    name: ClassVar[str] = "info_nce"

    def __init__(self, width_x: int, width_y: int, hidden: int) -> None:
        super().__init__()
        self.encode_x, self.encode_y = _mlp(width_x, hidden, hidden), _mlp(width_y, hidden, hidden)
        _zero(self.encode_y[-1])

    def forward(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        """The bound's term of each row against the others of the batch, [B]."""
        scores_BB = self.encode_x(x_BD) @ self.encode_y(y_BD).T
        return scores_BB.diagonal() - scores_BB.logsumexp(1) + math.log(len(x_BD))

    def loss(self, x_BD: Tensor, y_BD: Tensor) -> Tensor:
        return -self(x_BD, y_BD).mean()

    def terms(self, x_ND: Tensor, y_ND: Tensor) -> Floats:
        """Terms of equal blocks of at most MAX_CANDIDATES rows, [N, 1] float64."""
        blocks = math.ceil(len(x_ND) / MAX_CANDIDATES)
        parts = zip(x_ND.tensor_split(blocks), y_ND.tensor_split(blocks), strict=True)
        return torch.cat([self(x, y) for x, y in parts]).double().cpu().numpy()[:, None]

    @staticmethod
    def value(means: Floats) -> Floats:
        return means[..., 0]

    @staticmethod
    def ceiling(num_samples: int) -> float | None:
        return math.log(math.ceil(num_samples / math.ceil(num_samples / MAX_CANDIDATES)))


Bound = DonskerVaradhan | InfoNCE


def mine(
    x: Tensor,
    y: Tensor,
    users: ArrayLike | None = None,
    settings: CriticSettings = CriticSettings(),
    seed: int = 0,
) -> Estimate:
    """The Donsker–Varadhan bound. x [n, d] or [n], y [n, e] or [n], any real type, on one device; users [n]
    or None: every sample is a user of its own.

    No estimate of this kind can be trusted beyond about log n (McAllester & Stratos 2020). Raises DataError
    for fewer than MIN_SAMPLES users, different lengths, or values that are not finite.
    """
    return _estimate(DonskerVaradhan, x, y, users, settings, seed)


def info_nce(
    x: Tensor,
    y: Tensor,
    users: ArrayLike | None = None,
    settings: CriticSettings = CriticSettings(),
    seed: int = 0,
) -> Estimate:
    """The InfoNCE bound; arguments and errors as for mine(). `ceiling` is log N: a value near it says only
    that the information is at least about that."""
    return _estimate(InfoNCE, x, y, users, settings, seed)


def _estimate(
    kind: type[Bound], x: Tensor, y: Tensor, users: ArrayLike | None, settings: CriticSettings, seed: int
) -> Estimate:
    x, y = as_columns(x), as_columns(y)
    owners = np.arange(len(x)) if users is None else np.asarray(users)
    check_samples(x, y, owners)
    train, selection, held_out = _split(owners, seed)
    x, y = (standardised(values, train) for values in (x, y))
    values, scores, terms = [], [], []
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        for restart in range(settings.restarts):
            torch.manual_seed(seed * 1_000_003 + restart)
            bound = kind(x.shape[1], y.shape[1], settings.hidden).to(x.device)
            scores.append(_train(bound, x, y, train, selection, settings))
            with torch.no_grad():
                terms.append(bound.terms(x[held_out], y[held_out]))
            values.append(float(kind.value(terms[-1].mean(0))))
    best = int(np.argmax(scores))  # chosen without a look at the held-out samples
    apart = owners[held_out.cpu().numpy()]
    resampled = kind.value(cluster_means(terms[best], apart, seed=seed))
    low, high = interval_ends(np.float64(values[best]), resampled, len(np.unique(apart)), ANY)
    return Estimate(
        value=values[best],
        low=float(low),
        high=max(
            0.0, float(high)
        ),  # a critic that has learned noise can have a bound below 0; T = 0 beats it
        estimator=kind.name,
        num_samples=len(held_out),
        ceiling=kind.ceiling(len(held_out)),
        restarts=tuple(values),
    )


def _train(
    bound: Bound, x: Tensor, y: Tensor, train: Tensor, selection: Tensor, settings: CriticSettings
) -> float:
    """Train, and keep the weights of the check that was best on the selection part; returns its value."""
    optimizer = torch.optim.Adam(bound.parameters(), lr=settings.lr)
    every = max(1, settings.steps // NUM_CHECKS)
    best, weights = -math.inf, {name: tensor.clone() for name, tensor in bound.state_dict().items()}
    for step in range(settings.steps + 1):
        if step % every == 0 or step == settings.steps:
            with torch.no_grad():
                value = float(bound.value(bound.terms(x[selection], y[selection]).mean(0)))
            if value > best:
                best, weights = value, {name: tensor.clone() for name, tensor in bound.state_dict().items()}
        rows = train[torch.randperm(len(train))[: settings.batch_size].to(train.device)]
        optimizer.zero_grad()
        bound.loss(x[rows], y[rows]).backward()
        nn.utils.clip_grad_norm_(bound.parameters(), 1.0)
        optimizer.step()
    bound.load_state_dict(weights)
    return best


def _split(owners: NDArray[np.generic], seed: int) -> Sequence[Tensor]:
    """Rows of the three parts; no owner has rows in two."""
    _, place, counts = np.unique(owners, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(counts))
    share = np.empty(len(counts))  # of the samples that come before an owner's
    share[order] = (np.cumsum(counts[order]) - counts[order]) / len(owners)
    part = np.digitize(share, np.cumsum(SHARES))[place]
    # Shuffled: terms() pairs a row with the rows around it, which must not be the same owner's.
    rows = np.random.default_rng((seed, 1)).permutation(len(owners))
    parts = [torch.from_numpy(rows[part[rows] == number]) for number in range(3)]
    if min(map(len, parts)) < 2:  # no pair of different rows
        raise DataError(
            f"one user has {counts.max()} of {len(owners)} samples: too few others to select and measure by"
        )
    return parts


def standardised(values: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
    """Columns of mean 0 and deviation 1 over `rows` (all); a constant column becomes 0."""
    deviation, mean = torch.std_mean(values[rows], dim=0)
    return (values - mean) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


def as_columns(values: Tensor) -> Tensor:
    """[n] or [n, d] of any real type → [n, d] float32, without a gradient."""
    values = values.detach().float()
    return values[:, None] if values.ndim == 1 else values


def check_samples(x: Tensor, y: Tensor, owners: NDArray[np.generic]) -> None:
    """Raises DataError when the samples cannot give an estimate."""
    if not len(x) == len(y) == len(owners):
        raise DataError(
            f"x has {len(x)} samples, y {len(y)}, users {len(owners)}: they must be the same events"
        )
    if (num_users := len(np.unique(owners))) < MIN_SAMPLES:
        raise DataError(f"{num_users} independent samples: mutual information needs at least {MIN_SAMPLES}")
    for name, values in (("x", x), ("y", y)):
        if not bool(values.isfinite().all()):
            raise DataError(f"{name} holds values that are not finite: drop those events")


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ELU(), nn.Linear(hidden, hidden), nn.ELU(), nn.Linear(hidden, out)
    )


def _zero(layer: nn.Module) -> None:
    """T = 0, whose bound is 0, is where training starts; the first check can keep it."""
    assert isinstance(layer, nn.Linear)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
