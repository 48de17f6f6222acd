"""Beam search inside a trie against search by loops over dictionaries, and against every id spelled out."""

import pytest
import torch

from trainer.models.contract import UNREACHED
from trainer.models.layers.trie import END, Children, beam_search, id_lengths, token_log_probs, trie_nodes

VOCABULARY, LENGTH = 7, 4


def random_ids(number: int, seed: int) -> torch.Tensor:
    """Distinct ids of 1 to 3 tokens before END."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < number:
        size = int(torch.randint(1, LENGTH, (1,), generator=generator))
        tokens = torch.randint(1, VOCABULARY, (size,), generator=generator).tolist()
        padded = tuple(tokens) + (END,) * (LENGTH - size)
        found[padded] = None
    return torch.tensor(list(found))


def next_logits(row: int, begun: tuple[int, ...]) -> torch.Tensor:
    """Some function of the event and of what has been spelled."""
    seed = hash((row, *begun)) % 2**31
    return 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def batched(begun_BKl: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [torch.stack([next_logits(b, tuple(k)) for k in rows]) for b, rows in enumerate(begun_BKl.tolist())]
    )


def spelled(row: int, tokens: list[int]) -> float:
    """log P of an id up to and with its first END."""
    total = 0.0
    for place, token in enumerate(tokens):
        total += float(next_logits(row, tuple(tokens[:place])).log_softmax(0)[token])
        if token == END:
            break
    return total


def slow_search(row: int, ids: list[tuple[int, ...]], num_beams: int) -> dict[tuple[int, ...], float]:
    """Ids without padding → log P of those that are reached."""
    words = [w[: w.index(END) + 1] if END in w else w for w in ids]
    beams: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(LENGTH):
        longer: dict[tuple[int, ...], float] = {}
        for begun, log_p in beams.items():
            if begun and begun[-1] == END:
                longer[begun] = log_p
                continue
            log = next_logits(row, begun).log_softmax(0)
            for word in words:
                if word[: len(begun)] == begun and len(word) > len(begun):
                    longer[word[: len(begun) + 1]] = log_p + float(log[word[len(begun)]])
        beams = dict(sorted(longer.items(), key=lambda item: -item[1])[:num_beams])
    return beams


def candidates_of(ids: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(len(ids), generator=generator)[:12] for _ in range(3)])
    return ids[rows], trie_nodes(ids).T[rows]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_beams", [1, 2, 4, 12])
def test_beam_search_is_that_of_loops_and_never_leaves_the_trie(num_beams: int, seed: int) -> None:
    ids = random_ids(40, seed)
    ids_BCL, nodes_BCX = candidates_of(ids, seed)
    scores = beam_search(batched, ids_BCL, nodes_BCX, num_beams)
    for event in range(3):
        legal = [tuple(word) for word in ids_BCL[event].tolist()]
        slow = slow_search(event, legal, num_beams)
        for word, score in zip(legal, scores[event].tolist(), strict=True):
            short = word[: word.index(END) + 1] if END in word else word
            assert score == pytest.approx(slow.get(short, UNREACHED), abs=1e-4)
        assert 1 <= (scores[event] > UNREACHED).sum() <= num_beams


def test_enough_beams_spell_every_candidate() -> None:
    ids = random_ids(30, 7)
    scores = beam_search(batched, ids.expand(2, -1, -1), trie_nodes(ids).T.expand(2, -1, -1), len(ids))
    for event in range(2):
        expected = [spelled(event, word) for word in ids.tolist()]
        assert scores[event].tolist() == pytest.approx(expected, abs=1e-4)


def test_nodes_are_equal_where_beginnings_are() -> None:
    ids = random_ids(25, 3)
    nodes = trie_nodes(ids)
    for length in range(LENGTH + 1):
        for a in range(len(ids)):
            for b in range(len(ids)):
                same = ids[a, :length].tolist() == ids[b, :length].tolist()
                assert bool(nodes[length, a] == nodes[length, b]) == same


def test_tokens_behind_the_end_cost_nothing() -> None:
    ids = torch.tensor([[3, END, END], [3, 4, 5]])
    assert id_lengths(ids).tolist() == [2, 3]
    logits = torch.randn(2, 3, VOCABULARY)
    log = logits.log_softmax(-1)
    expected = [[log[0, 0, 3], log[0, 1, END], 0.0], [log[1, 0, 3], log[1, 1, 4], log[1, 2, 5]]]
    torch.testing.assert_close(token_log_probs(logits, ids, trie_nodes(ids).T), torch.tensor(expected))


def test_among_legal_tokens_the_ids_share_all_probability() -> None:
    ids = random_ids(30, 5)
    nodes = trie_nodes(ids)
    legal = Children.of(ids, nodes)
    begun = [[tuple(word[:length]) for length in range(LENGTH)] for word in ids.tolist()]
    logits = torch.stack([torch.stack([next_logits(0, some) for some in word]) for word in begun])
    logits.requires_grad_()
    found = token_log_probs(logits, ids, nodes.T, legal)
    slow = torch.zeros(found.shape)
    for item, word in enumerate(ids.tolist()):
        for place in range(int(id_lengths(ids)[item])):
            children = sorted({other[place] for other in ids.tolist() if other[:place] == word[:place]})
            slow[item, place] = logits[item, place, word[place]] - logits[item, place, children].logsumexp(0)
    torch.testing.assert_close(found, slow)
    assert found.sum(1).exp().sum().item() == pytest.approx(1)
    some = torch.randn(found.shape)
    (fast_gradient,), (slow_gradient,) = (
        torch.autograd.grad((each * some).sum(), logits) for each in (found, slow)
    )
    torch.testing.assert_close(fast_gradient, slow_gradient)
    searched = beam_search(batched, ids[None, 7:], nodes.T[None, 7:], len(ids), legal)
    torch.testing.assert_close(searched[0], found.sum(1)[7:])
