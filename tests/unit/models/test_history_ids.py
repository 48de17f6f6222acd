"""How models of sequences read a batch's history."""

import torch

from tests.tiny_world import make_batch
from trainer.models.layers.attention import masked_mean, masked_softmax
from trainer.models.layers.embedding import WordMean
from trainer.models.layers.history import (
    ages,
    clicked_ids,
    history_ids,
    left_padded,
    pack,
    session_means,
    sessions,
)


def test_ids_are_rows_plus_one_and_the_newest_stay():
    batch = make_batch([[4, 0, 7], [], [1]], torch.tensor([[2, 3]] * 3))

    assert history_ids(batch, "all", 5).tolist() == [[5, 1, 8], [0, 0, 0], [2, 0, 0]]
    assert history_ids(batch, "all", 2).tolist() == [[1, 8], [0, 0], [2, 0]]


def test_recommendations_only_move_together():
    batch = make_batch([[4, 5, 6, 7], [8, 9]], torch.tensor([[2, 3]] * 2), tasks=[[1, 0, 1, 0], [1, 1]])

    assert history_ids(batch, "rec", 2).tolist() == [[6, 8], [0, 0]]


def test_padding_is_neither_searched_nor_browsed_and_has_no_age():
    batch = make_batch([[4, 5, 6], [8]], torch.tensor([[2, 3]] * 2), tasks=[[1, 0, 1], [0]])

    assert batch.searched.tolist() == [[True, False, True], [False] * 3]
    assert batch.browsed.tolist() == [[False, True, False], [True, False, False]]
    assert ages(batch.history_mask).tolist() == [[2, 1, 0], [0, 0, 0]]


def test_a_session_is_the_mean_of_the_items_clicked_for_its_query():
    _, same = sessions(torch.tensor([[True, True, False, True]]), torch.tensor([[3, 3, -1, 3]]))
    items = torch.tensor([[[2.0], [4.0], [7.0], [5.0]]])

    assert session_means(items, same)[0, :, 0].tolist() == [3, 3, 0, 5]


def test_a_batch_without_any_history_has_one_column_of_padding():
    batch = make_batch([[], []], torch.tensor([[2, 3]] * 2))

    assert history_ids(batch, "all", 3).tolist() == [[0], [0]]


def test_padding_moves_to_the_front():
    ids = torch.tensor([[5, 1, 8], [0, 0, 0], [2, 0, 0]])

    assert left_padded(ids, 4).tolist() == [[0, 5, 1, 8], [0, 0, 0, 0], [0, 0, 0, 2]]
    assert left_padded(ids, 3).tolist() == [[5, 1, 8], [0, 0, 0], [0, 0, 2]]


def test_vectors_are_packed_like_ids():
    ids = torch.tensor([[0, 5, 0, 8]])

    assert pack(ids, ids != 0).tolist() == [[5, 8, 0, 0]]
    vectors = ids[..., None].expand(-1, -1, 2).float()
    assert pack(vectors, ids != 0)[0, :, 0].tolist() == [5, 8, 0, 0]


def test_the_clicked_item_is_found_anywhere_in_the_row():
    labels = torch.tensor([[0.0, 1.0], [1.0, 0.0]])

    assert clicked_ids(make_batch([[], []], torch.tensor([[2, 3], [4, 5]]), labels=labels)).tolist() == [4, 5]


def test_attention_to_nothing_is_zero():
    visible = torch.tensor([[True, False], [False, False]])

    assert masked_softmax(torch.zeros(2, 2), visible).tolist() == [[1, 0], [0, 0]]
    assert masked_mean(torch.ones(2, 2, 3), visible)[:, 0].tolist() == [1, 0]


def test_no_texts_have_no_means():
    assert WordMean(5, 4)(torch.zeros(2, 0, 3, dtype=torch.int64)).shape == (2, 0, 4)
