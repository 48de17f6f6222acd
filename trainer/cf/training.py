"""Training of one LightGCN table: BPR by epochs, early stopping on validation, and a state from which it
continues bit for bit (on CPU)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_shards.hashing import derive_seed
from data_shards.negatives import user_item_keys
from trainer.cf.lightgcn import Graph, LightGCN, build_graph
from trainer.cf.partial import Slot
from trainer.config import CfConfig
from trainer.errors import RunError
from trainer.evaluation.metrics import METRICS, expected_ranks, metric_values
from trainer.runtime.device import default_device, wait_for
from trainer.runtime.memory import give_back_freed_memory
from trainer.runtime.progress import report

MIN_STEPS_BETWEEN_VALIDATIONS = 50
VALID_CHUNK = 2048  # events scored at once: 2048 × 100 candidates × 64 floats = 52 MB


@dataclass(frozen=True)
class Edges:
    """Unique training rec clicks, sorted by (user, item). Tables are trained for the items that anyone
    clicked: often the smaller part of a catalogue."""

    users: np.ndarray  # [E] int64
    items: np.ndarray  # [E] int64, rows of item_ids
    item_ids: np.ndarray  # [I] int64, ascending catalogue rows; a part (`keep`) has those of the whole
    num_users: int
    catalog_size: int

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def items_in_catalog(self) -> np.ndarray:
        """[E] int64, catalogue rows."""
        return self.item_ids[self.items]

    def keep(self, mask: np.ndarray) -> "Edges":
        return replace(self, users=self.users[mask], items=self.items[mask])

    def rows_of(self, catalog_rows: np.ndarray) -> np.ndarray:
        """Rows of item_ids; num_items for items that nobody clicked."""
        rows = np.searchsorted(self.item_ids, catalog_rows)
        found = self.item_ids[np.minimum(rows, self.num_items - 1)] == catalog_rows
        return np.where(found, rows, self.num_items)

    def in_catalog(self, vectors_IK: Tensor) -> Tensor:
        """Vectors of item_ids → [catalog_size, K], zeros for items that nobody clicked."""
        table = vectors_IK.new_zeros(self.catalog_size, vectors_IK.shape[1])
        table[torch.from_numpy(self.item_ids)] = vectors_IK
        return table


def unique_clicks(users: np.ndarray, catalog_rows: np.ndarray, num_users: int, catalog_size: int) -> Edges:
    """Edges of the graph: each pair (user, item of the catalogue) once."""
    keys = user_item_keys(users, catalog_rows, catalog_size)
    rows, clicked = keys % catalog_size, np.zeros(catalog_size, bool)
    clicked[rows] = True
    items = (np.cumsum(clicked) - 1)[rows]
    return Edges(keys // catalog_size, items, np.flatnonzero(clicked), num_users, catalog_size)


def choose_batch_size(num_clicks: int) -> int:
    """About a thirtieth of an epoch, as a power of two: 512 … 2^18. A step costs passes over the whole graph,
    so large graphs need few large steps."""
    return 1 << min(max((num_clicks // 32).bit_length(), 9), 18)


class TableTrainer:
    """One table: BPR over all clicks, uniform negatives of the whole catalogue that the user has not clicked
    *in this table's graph*.

    A held-out click may be drawn as a negative like any unknown item: avoiding it would tell the table about
    it.
    """

    def __init__(self, clicks: Edges, config: CfConfig, say: Callable[[str], None]) -> None:
        self.clicks, self.config, self.say = clicks, config, say
        self.device = torch.device(default_device())
        self.graph: Graph = build_graph(clicks.users, clicks.items, clicks.num_users, clicks.num_items).to(
            self.device
        )
        # every table starts from the same vectors, so their spaces differ little even before the rotation
        self.model = LightGCN(
            clicks.num_users, clicks.num_items, config.dim, config.layers, derive_seed(config.seed, 1)
        ).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        self.generator = torch.Generator(self.device).manual_seed(derive_seed(config.seed, 2))
        self.users, self.items, self.keys = (
            torch.from_numpy(a).to(self.device)
            for a in (clicks.users, clicks.items, self._key(clicks.users, clicks.items))
        )
        self.batch_size = config.batch_size or choose_batch_size(len(clicks.users))
        self.steps_per_epoch = -(-len(clicks.users) // self.batch_size)
        self.epochs_done = 0

    def fit(self, num_epochs: int, slot: Slot) -> tuple[Tensor, Tensor]:
        """Go on to `num_epochs` → user vectors and those of clicks.item_ids, on the CPU; zeros when there is
        no click (a fold of a tiny log)."""
        if saved := slot.load():
            self.load_state(*saved)
            self.say(f"continuing table {slot.name} after epoch {self.epochs_done}")
        while self.epochs_done < num_epochs and len(self.users):
            self.epoch()
            if slot.is_due():
                slot.save(*self.state())
        return self.vectors()

    def fit_until_valid(
        self, valid: tuple[np.ndarray, np.ndarray], slot: Slot
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Early stopping on validation NDCG@10 of users [n] and catalogue rows [n, 1 + negatives]. Without
        validation rec events: cf.max_epochs. → best vectors as of fit(), what was seen."""
        config = self.config
        if len(valid[0]) == 0:
            user, item = self.fit(config.max_epochs, slot)
            return user, item, {"epochs": config.max_epochs, "ndcg@10": None, "num_events": 0, "curve": []}
        valid_users, valid_candidates = valid[0], self.clicks.rows_of(valid[1])
        every = max(1, round(MIN_STEPS_BETWEEN_VALIDATIONS / self.steps_per_epoch))
        best: dict[str, Tensor] = {}
        curve: list[list[float]] = []  # [epoch, NDCG@10]
        if saved := slot.load():
            tensors, document = saved
            self.load_state(tensors, document)
            best, curve = {name: tensors[f"best.{name}"] for name in ("user", "item")}, document["curve"]
            self.say(f"continuing table {slot.name} after epoch {self.epochs_done}")
        best_epoch, best_ndcg = max(curve, key=lambda point: point[1], default=[0, -1.0])
        while (
            self.epochs_done < config.max_epochs
            and sum(epoch > best_epoch for epoch, _ in curve) < config.patience
        ):
            loss = self.epoch()
            if self.epochs_done % every and self.epochs_done != config.max_epochs:
                continue
            user, item = self.vectors()
            give_back_freed_memory()
            ndcg = sampled_ndcg(user, item, valid_users, valid_candidates)
            curve.append([self.epochs_done, ndcg])
            if ndcg > best_ndcg:
                best_epoch, best_ndcg, best = self.epochs_done, ndcg, {"user": user, "item": item}
            self.say(
                f"epoch {self.epochs_done}: loss {loss:.4f}, validation NDCG@10 {ndcg:.4f} (best "
                f"{best_ndcg:.4f} at {best_epoch})"
            )
            if slot.is_due():
                tensors, document = self.state()
                slot.save(
                    {**tensors, **{f"best.{name}": value for name, value in best.items()}},
                    {**document, "curve": curve},
                )
        rounded = [[epoch, round(ndcg, 5)] for epoch, ndcg in curve]
        return (
            best["user"],
            best["item"],
            {
                "epochs": best_epoch,
                "ndcg@10": round(best_ndcg, 5),
                "num_events": len(valid[0]),
                "curve": rounded,
            },
        )

    def epoch(self) -> float:
        """One pass over the clicks in random order → the last batch's loss."""
        order = torch.randperm(len(self.users), generator=self.generator, device=self.device)
        loss = torch.zeros(())
        for step, index in enumerate(order.split(self.batch_size)):
            report(f"epoch {self.epochs_done + 1}", step * self.batch_size, len(self.users))
            user = self.users[index]
            loss = self.model.loss(
                self.graph, user, self.items[index], self.draw_negatives(user), self.config.reg
            )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        value = float(loss.detach())
        if not np.isfinite(value):
            raise RunError(f"LightGCN's loss is {value}: lower cf.lr (now {self.config.lr}).")
        self.epochs_done += 1
        return value

    def step_seconds(self) -> float:
        """Seconds of one step, measured without changing weights or random numbers."""
        user, item = self.users[: self.batch_size], self.items[: self.batch_size]
        for _ in range(2):  # the first takes new memory, and on a GPU starts its libraries
            started = time.monotonic()
            self.model.loss(self.graph, user, item, item, self.config.reg).backward()
            wait_for(self.device)
            self.model.zero_grad(set_to_none=True)
        return time.monotonic() - started

    def draw_negatives(self, user: Tensor, rounds: int = 3) -> Tensor:
        """Uniform numbers below catalog_size: rows of item_ids, and from num_items on items that nobody
        clicked, which are all alike. What the user clicked is drawn again, `rounds` times at most (a user may
        have clicked nearly everything)."""

        def draw() -> Tensor:
            return torch.randint(
                self.clicks.catalog_size, user.shape, generator=self.generator, device=self.device
            )

        negative = draw()
        for _ in range(rounds):
            wanted = self._key(user, negative)
            place = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
            again = draw()
            negative = torch.where(self.keys[place] == wanted, again, negative)
        return negative

    def _key(self, users: Any, items: Any) -> Any:
        """One number for a user and an item, in the order of (user, item)."""
        return users * self.clicks.catalog_size + items

    def vectors(self) -> tuple[Tensor, Tensor]:
        users_UK, items_IK = self.model.vectors(self.graph)
        return users_UK.cpu(), items_IK.cpu()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Layer-0 vectors, Adam's moments and the random generator; and the epochs done."""
        tensors = {"generator": self.generator.get_state()}
        for name, parameter in self.model.named_parameters():
            tensors[name] = parameter.detach()
            tensors.update({f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()})
        return tensors, {"epochs_done": self.epochs_done}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        self.epochs_done = document["epochs_done"]
        self.generator.set_state(tensors["generator"])
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[name])
            moments = {
                key.removeprefix(f"{name}."): value
                for key, value in tensors.items()
                if key.startswith(f"{name}.")
            }
            self.optimizer.state[parameter] = {key: value.to(self.device) for key, value in moments.items()}


def sampled_ndcg(user: Tensor, item: Tensor, valid_users: np.ndarray, valid_candidates: np.ndarray) -> float:
    """NDCG@10 of e_u · e_i over the stored candidates, positive in column 0. Candidates are rows of `item`;
    beyond its end, of items that score 0."""
    values = []
    for start in range(0, len(valid_users), VALID_CHUNK):
        users_B = torch.from_numpy(valid_users[start : start + VALID_CHUNK])
        candidates_BC = torch.from_numpy(valid_candidates[start : start + VALID_CHUNK])
        scores_BC = torch.einsum(
            "bk,bck->bc", user[users_B], item[candidates_BC.clamp(max=len(item) - 1)]
        ) * (candidates_BC < len(item))
        labels_BC = torch.zeros_like(scores_BC)
        labels_BC[:, 0] = 1
        values.append(metric_values(*expected_ranks(scores_BC, labels_BC)))
    return float(torch.cat(values)[:, METRICS.index("ndcg@10")].mean())
