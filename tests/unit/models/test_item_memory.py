"""Each item is computed once, and nothing is remembered where gradients are wanted."""

import torch

from trainer.models.layers.item_memory import ItemMemory


def test_each_item_is_computed_once() -> None:
    table, asked = torch.randn(6, 3), []

    def compute(rows: torch.Tensor) -> torch.Tensor:
        asked.extend(rows.flatten().tolist())
        return table[rows]

    memory = ItemMemory(6)
    with torch.no_grad():
        for rows in (torch.tensor([[4, 1], [1, 0]]), torch.tensor([0, 5, 5]), torch.tensor([4])):
            assert torch.equal(memory(rows, compute), table[rows])
    assert sorted(asked) == [0, 1, 4, 5]
    table.requires_grad_()
    memory(torch.tensor([4, 5]), compute).sum().backward()
    assert table.grad is not None and table.grad[4:].eq(1).all()
