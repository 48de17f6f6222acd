"""The tables of optim.sparse_rows: which are taken apart, what a step does to them, how they are clipped."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer.config import OptimConfig
from trainer.errors import ConfigError, RunError
from trainer.models.layers.embedding import ItemTable, tables_by_rows
from trainer.training.optimizer import make_optimizer
from trainer.training.sparse_rows import SparseRows, large_tables, take_apart

IDS = torch.tensor([[3, 3, 0], [7, 1, 0]])  # an item twice, padding
CONFIG = OptimConfig(lr=0.1, weight_decay=0.0)


class Two(nn.Module):
    """Two tables and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items, self.users = ItemTable(20, 4, std=1.0), ItemTable(8, 4, std=1.0)
        self.layer = nn.Linear(4, 1)

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        loss: Tensor = (self.layer(self.items(ids) * self.users(ids[:, :1])) * scale).square().sum()
        return loss


def by_rows(at_least: int = 1, config: OptimConfig = CONFIG) -> tuple[Two, SparseRows]:
    model = Two()
    take_apart(model, at_least)
    return model, SparseRows(tables_by_rows(model), config)


def gradient(rows: SparseRows, name: str) -> Tensor:
    sparse = rows.weight[name].grad
    assert sparse is not None and sparse.is_sparse
    return sparse.to_dense()


def test_large_tables_are_chosen_and_something_stays_for_ddp() -> None:
    model = Two()
    assert large_tables(model, 0) == [] and large_tables(model, 21) == [model.items]
    assert large_tables(model, 9) == [model.items, model.users]
    with pytest.raises(ConfigError, match="sparse_rows=22: the model has no table of that many"):
        large_tables(model, 22)
    tables = nn.ModuleList([model.items, model.users])
    assert large_tables(tables, 1) == [model.items], "the smaller one stays a parameter"
    with pytest.raises(ConfigError, match="beside other weights"):
        large_tables(model.items, 1)


def test_a_table_taken_apart_is_no_parameter_and_in_no_state_dict() -> None:
    model, rows = by_rows()
    assert {name for name, _ in model.named_parameters()} == {"layer.weight", "layer.bias"}
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    assert set(rows.weights()) == {"items.weight", "users.weight"}
    assert torch.equal(rows.weights()["items.weight"], Two().items.weight)
    with torch.no_grad():
        assert torch.equal(model(IDS), Two()(IDS))
        model.items(scores_of=torch.ones(1, 4))  # whoever only ranks may read the whole table
    assert model.items.taken == []
    with pytest.raises(ConfigError, match="every row has a gradient"):
        model.items(scores_of=torch.ones(1, 4))


def test_a_step_is_adams_for_the_rows_that_were_read_and_nothing_for_the_others() -> None:
    """The first step, when the moments are 0, is AdamW's but for the place of its epsilon. In the second,
    AdamW moves rows that were read before; here they stand."""
    whole, (model, rows) = Two(), by_rows()
    dense = make_optimizer(whole, CONFIG)
    others = torch.optim.SGD(model.parameters(), lr=0.0)
    before = rows.weights()["items.weight"].clone()
    for ids in (IDS, IDS + (IDS > 0)):
        first = ids is IDS
        whole(ids).backward()
        model(ids).backward()
        rows.clip(model.parameters(), 1e9)
        torch.testing.assert_close(gradient(rows, "items.weight"), whole.items.weight.grad)
        dense.step()
        rows.step()
        dense.zero_grad()
        others.zero_grad()
        if first:
            torch.testing.assert_close(rows.weights()["items.weight"], whole.items.weight, atol=1e-5, rtol=0)
            torch.testing.assert_close(rows.weights()["users.weight"], whole.users.weight, atol=1e-5, rtol=0)
            with torch.no_grad():  # the layer too, so that the next gradients agree
                model.layer.load_state_dict(whole.layer.state_dict())
                after_first = rows.weights()["items.weight"].clone()
        else:
            break
    moved = (rows.weights()["items.weight"] != after_first).any(1).nonzero()[:, 0].tolist()
    assert moved == [2, 4, 8]
    assert sorted((whole.items.weight != after_first).any(1).nonzero()[:, 0].tolist()) == [1, 2, 3, 4, 7, 8]
    assert torch.equal(after_first[[0, 2, 4, 20]], before[[0, 2, 4, 20]])
    assert model.items.taken == [] and rows.weight["items.weight"].grad is None


def test_micro_batches_add_up() -> None:
    (one, whole), (two, halves) = by_rows(), by_rows()
    one(IDS).backward()
    for part in IDS.split(1):
        two(part).backward()
    for rows in (whole, halves):
        rows.gather()
    for name in whole.weight:
        torch.testing.assert_close(gradient(halves, name), gradient(whole, name), rtol=1e-5, atol=1e-6)


def test_rows_and_parameters_are_clipped_together() -> None:
    whole, (model, rows) = Two(), by_rows()
    for one in (whole, model):
        one(IDS, scale=10.0).backward()
    total = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    assert total > 1
    rows.clip(model.parameters(), 0.5)
    torch.testing.assert_close(rows._norm, total)
    torch.testing.assert_close(model.layer.weight.grad, whole.layer.weight.grad)
    for name in ("items", "users"):
        found = gradient(rows, f"{name}.weight")
        torch.testing.assert_close(found, getattr(whole, name).weight.grad)


def test_weight_decay_is_of_the_rows_that_were_read() -> None:
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    (plain_model, plain), (model, rows) = by_rows(), by_rows(config=config)
    before = rows.weights()["items.weight"].clone()
    for one, of in ((plain_model, plain), (model, rows)):
        one(IDS).backward()
        of.clip(one.parameters(), 1e9)
        of.step()
    read = [1, 3, 7]
    expected = plain.weights()["items.weight"].clone()
    expected[read] -= 0.1 * 0.5 * before[read]
    torch.testing.assert_close(rows.weights()["items.weight"], expected)


def test_a_step_that_was_left_out_changes_nothing() -> None:
    """DeepSpeed does not ask for the norm then."""
    model, rows = by_rows()
    before = rows.weights()["items.weight"].clone()
    model(IDS).backward()
    rows.step()
    assert torch.equal(rows.weights()["items.weight"], before) and model.items.taken == []


def test_a_checkpoint_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"written without optim\.sparse_rows"):
        by_rows()[1].load(tmp_path / "rows.safetensors")
