"""Ids of items as words: distinct, and written as by loops."""

import torch

from trainer.batch import term_counts
from trainer.models.layers.item_ids import as_matrix, distinct_ids, diverse_greedy, rare_words
from trainer.models.layers.trie import END

STOP, VOCABULARY = 1, 9


def logits_of(row: int, begun: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(hash((row, *begun)) % 2**31))


def batched(begun_BGl: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [torch.stack([logits_of(b, tuple(g)) for g in rows]) for b, rows in enumerate(begun_BGl.tolist())]
    )


def test_diverse_search_is_that_of_loops() -> None:
    found = diverse_greedy(batched, 3, 4, 0.7, 5, torch.tensor([END, STOP])).tolist()
    for row in range(3):
        groups: list[list[int]] = [[] for _ in range(4)]
        for step in range(5):
            taken = torch.zeros(VOCABULARY)
            for begun in groups:
                log = logits_of(row, tuple(begun)).log_softmax(0)
                token = int((log - 0.7 * taken).argmax())
                taken[token] += 1
                ended = token in (END, STOP) or (step > 0 and begun[-1] == END)
                begun.append(END if ended else token)
        assert found[row] == groups
    assert len({tuple(group) for group in found[0]}) > 1


def test_ids_are_the_first_free_wording_then_a_number() -> None:
    rounds = [{0: [(3, 4)], 1: [(3, 4), (5,)], 2: [(5,), (3, 4)], 3: [()]}, {2: [(5,)], 3: [(3, 4)]}]
    calls = [lambda items, said=said: [said[item] for item in items] for said in rounds]
    assert distinct_ids(calls, 4, lambda n: (100 + n,)) == [(3, 4), (5,), (5, 101), (101,)]
    known = {0: (5,), 2: (9, 9)}  # of items that had one before: kept, and taken
    assert distinct_ids([lambda items: [[(5,), (7,)]] * len(items)], 4, lambda n: (100 + n,), known) == [
        (5,),
        (7,),
        (9, 9),
        (5, 101),
    ]


def test_every_item_gets_an_id_of_its_own() -> None:
    calls = [lambda items: [[(2, 3)] for _ in items]]
    ids = distinct_ids(calls, 50, lambda n: tuple(int(digit) + 1 for digit in str(n)))
    assert len(set(ids)) == 50 and ids[0] == (2, 3)
    matrix = as_matrix(ids, 6)
    assert matrix.shape == (50, 6) and matrix[:, -1].eq(END).all()
    assert [tuple(token for token in row if token != END) for row in matrix.tolist()] == ids


def test_the_rarest_words_stay_in_the_order_of_the_text() -> None:
    # 5 occurs four times, 6 twice, 7 and 8 once
    texts = torch.tensor([[5, 8, 6, 7], [5, 5, 6, 0], [5, 0, 0, 0], [0, 0, 0, 0]])
    counts = term_counts(texts, 9)
    assert counts.tolist() == [8, 0, 0, 0, 0, 4, 2, 1, 1]
    assert rare_words(texts, counts, 2) == [(8, 7), (5, 6), (5,), ()]
    assert rare_words(texts, counts, 3) == [(8, 6, 7), (5, 6), (5,), ()]
    assert rare_words(texts, counts, 9) == [(5, 8, 6, 7), (5, 6), (5,), ()]
