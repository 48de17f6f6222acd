"""Our CSR propagation against torch_geometric's LightGCN: vectors and gradients."""

import numpy as np
import pytest
import torch

from trainer.model.lightgcn import LightGCN, build_graph

NUM_USERS, NUM_ITEMS, DIM = 30, 20, 16


def random_clicks(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unique clicks in which every user and item takes part."""
    keys = np.random.default_rng(seed).choice(NUM_USERS * NUM_ITEMS, 150, replace=False)
    cover = np.arange(NUM_USERS) * NUM_ITEMS + np.arange(NUM_USERS) % NUM_ITEMS
    keys = np.unique(np.concatenate([keys, cover]))
    return keys // NUM_ITEMS, keys % NUM_ITEMS


def gradients(model: LightGCN) -> torch.Tensor:
    """Gradients of users, then items, [U + I, K]."""
    assert model.users.grad is not None
    assert model.items.grad is not None
    return torch.cat([model.users.grad, model.items.grad])


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_vectors_and_gradients_equal_torch_geometric(num_layers):
    geometric = pytest.importorskip("torch_geometric.nn.models")
    users, items = random_clicks()
    ours = LightGCN(NUM_USERS, NUM_ITEMS, DIM, num_layers)
    theirs = geometric.LightGCN(NUM_USERS + NUM_ITEMS, DIM, num_layers)
    with torch.no_grad():
        theirs.embedding.weight.copy_(torch.cat([ours.users, ours.items]))
    edges = torch.from_numpy(np.stack([users, items + NUM_USERS]))
    theirs_out = theirs.get_embedding(torch.cat([edges, edges.flip(0)], dim=1))
    ours_out = torch.cat(ours(build_graph(users, items, NUM_USERS, NUM_ITEMS)))
    torch.testing.assert_close(ours_out, theirs_out, atol=1e-5, rtol=0)

    pull = torch.randn(theirs_out.shape, generator=torch.Generator().manual_seed(1))
    (theirs_out * pull).sum().backward()
    (ours_out * pull).sum().backward()
    torch.testing.assert_close(gradients(ours), theirs.embedding.weight.grad, atol=1e-5, rtol=0)


def test_bpr_loss_equals_torch_geometric():
    geometric = pytest.importorskip("torch_geometric.nn.models")
    users, items = random_clicks()
    graph, model = build_graph(users, items, NUM_USERS, NUM_ITEMS), LightGCN(NUM_USERS, NUM_ITEMS, DIM)
    user, positive = torch.from_numpy(users), torch.from_numpy(items)
    negative = (positive + 7) % NUM_ITEMS
    users_UK, items_IK = model(graph)
    theirs = geometric.LightGCN(NUM_USERS + NUM_ITEMS, DIM, 2)
    layer0 = torch.cat([model.users[user], model.items[positive], model.items[negative]])
    scores = [(users_UK[user] * items_IK[other]).sum(-1) for other in (positive, negative)]
    reference = geometric.lightgcn.BPRLoss(lambda_reg=0.005)(*scores, layer0)  # theirs has no factor ½
    assert theirs.num_layers == model.num_layers
    torch.testing.assert_close(model.loss(graph, user, positive, negative, reg=0.01), reference)


def test_isolated_nodes_are_zero_and_get_no_gradient():
    users, items = random_clicks()
    graph = build_graph(users, items, NUM_USERS + 2, NUM_ITEMS + 3)
    model = LightGCN(NUM_USERS + 2, NUM_ITEMS + 3, DIM)
    users_UK, items_IK = model(graph)
    assert not users_UK[NUM_USERS:].any()
    assert not items_IK[NUM_ITEMS:].any()
    assert users_UK[:NUM_USERS].abs().sum(1).gt(0).all()
    (users_UK.sum() + items_IK.square().sum()).backward()
    grad_users_UK, grad_items_IK = gradients(model).split([NUM_USERS + 2, NUM_ITEMS + 3])
    assert grad_users_UK[:NUM_USERS].any()
    assert not grad_users_UK[NUM_USERS:].any()
    assert not grad_items_IK[NUM_ITEMS:].any()


def test_graph_without_edges_propagates_to_zero():
    empty = np.zeros(0, np.int64)
    users_UK, items_IK = LightGCN(3, 4, DIM)(build_graph(empty, empty, 3, 4))
    assert not users_UK.any()
    assert not items_IK.any()
