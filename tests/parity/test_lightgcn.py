"""Our CSR propagation against torch_geometric's LightGCN: vectors, loss and gradients."""

from typing import Any

import numpy as np
import pytest
import torch

from trainer.cf.lightgcn import LightGCN, build_graph

NUM_USERS, NUM_ITEMS, DIM = 30, 20, 16


def random_clicks(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unique clicks in which every user and item takes part."""
    keys = np.random.default_rng(seed).choice(NUM_USERS * NUM_ITEMS, 150, replace=False)
    cover = np.arange(NUM_USERS) * NUM_ITEMS + np.arange(NUM_USERS) % NUM_ITEMS
    keys = np.unique(np.concatenate([keys, cover]))
    return keys // NUM_ITEMS, keys % NUM_ITEMS


def torch_geometric_twin(ours: LightGCN) -> Any:
    """torch_geometric's model with the same weights; items follow the users in its one table."""
    geometric = pytest.importorskip("torch_geometric.nn.models")
    num_users, num_items = len(ours.users), len(ours.items)
    theirs = geometric.LightGCN(num_users + num_items, DIM, ours.num_layers)
    with torch.no_grad():
        theirs.embedding.weight.copy_(torch.cat([ours.users, ours.items]))
    return theirs


def both_ways(users: np.ndarray, items: np.ndarray) -> torch.Tensor:
    edges = torch.from_numpy(np.stack([users, items + NUM_USERS]))
    return torch.cat([edges, edges.flip(0)], dim=1)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_vectors_equal_torch_geometric(num_layers: int) -> None:
    users, items = random_clicks()
    ours = LightGCN(NUM_USERS, NUM_ITEMS, DIM, num_layers)
    theirs_out = torch_geometric_twin(ours).get_embedding(both_ways(users, items))
    ours_out = torch.cat(ours.vectors(build_graph(users, items, NUM_USERS, NUM_ITEMS)))
    torch.testing.assert_close(ours_out, theirs_out, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_bpr_loss_and_gradients_equal_torch_geometric(num_layers: int) -> None:
    """Items that several triples name, as positive and as negative, included."""
    users, items = random_clicks()
    graph = build_graph(users, items, NUM_USERS, NUM_ITEMS)
    ours = LightGCN(NUM_USERS, NUM_ITEMS, DIM, num_layers)
    theirs = torch_geometric_twin(ours)
    user, positive = torch.from_numpy(users), torch.from_numpy(items)
    negative = (positive + 7) % NUM_ITEMS
    loss = ours.loss(graph, user, positive, negative, reg=0.01)
    loss.backward()

    vectors, layer0 = theirs.get_embedding(both_ways(users, items)), theirs.embedding.weight
    scores = [(vectors[user] * vectors[NUM_USERS + other]).sum(-1) for other in (positive, negative)]
    touched = torch.cat([layer0[user], layer0[NUM_USERS + positive], layer0[NUM_USERS + negative]])
    reference = bpr_loss(lambda_reg=0.005)(*scores, touched)  # theirs has no factor ½
    reference.backward()
    torch.testing.assert_close(loss, reference)
    assert ours.users.grad is not None and ours.items.grad is not None
    torch.testing.assert_close(
        torch.cat([ours.users.grad, ours.items.grad]), layer0.grad, atol=1e-6, rtol=1e-4
    )


def bpr_loss(**settings: float) -> Any:
    from torch_geometric.nn.models.lightgcn import BPRLoss

    return BPRLoss(**settings)


def test_an_item_outside_the_graph_is_as_good_a_negative_as_an_isolated_one() -> None:
    """Tables hold the clicked items only; the loss and every gradient are those of a table with all items."""
    users, items = random_clicks()
    user, positive = torch.from_numpy(users), torch.from_numpy(items)
    negative = torch.randint(NUM_ITEMS + 5, user.shape, generator=torch.Generator().manual_seed(3))
    small, large = LightGCN(NUM_USERS, NUM_ITEMS, DIM), LightGCN(NUM_USERS, NUM_ITEMS + 5, DIM)
    with torch.no_grad():
        large.users.copy_(small.users)
        large.items.zero_()[:NUM_ITEMS] = small.items
    losses = []
    for model in (small, large):
        graph = build_graph(users, items, NUM_USERS, len(model.items))
        losses.append(model.loss(graph, user, positive, negative, reg=0.01))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    assert small.items.grad is not None and large.items.grad is not None
    torch.testing.assert_close(small.items.grad, large.items.grad[:NUM_ITEMS])
    torch.testing.assert_close(small.users.grad, large.users.grad)
    assert not large.items.grad[NUM_ITEMS:].any()


def test_isolated_nodes_are_zero_and_get_no_gradient() -> None:
    users, items = random_clicks()
    graph = build_graph(users, items, NUM_USERS + 2, NUM_ITEMS + 3)
    model = LightGCN(NUM_USERS + 2, NUM_ITEMS + 3, DIM)
    users_UK, items_IK = model.vectors(graph)
    assert not users_UK[NUM_USERS:].any()
    assert not items_IK[NUM_ITEMS:].any()
    assert users_UK[:NUM_USERS].abs().sum(1).gt(0).all()
    negative = torch.randint(NUM_ITEMS + 3, (len(users),), generator=torch.Generator().manual_seed(3))
    model.loss(graph, torch.from_numpy(users), torch.from_numpy(items), negative, reg=0.0).backward()
    assert model.users.grad is not None and model.items.grad is not None
    assert model.users.grad[:NUM_USERS].any()
    assert not model.users.grad[NUM_USERS:].any()
    assert not model.items.grad[NUM_ITEMS:].any()


def test_graph_without_edges_propagates_to_zero() -> None:
    empty = np.zeros(0, np.int64)
    users_UK, items_IK = LightGCN(3, 4, DIM).vectors(build_graph(empty, empty, 3, 4))
    assert not users_UK.any()
    assert not items_IK.any()
