"""What the oracles of the search models do not say: drawn words, missing queries, kinds of history."""

import pytest
import torch

from data_shards.schema import SRC
from tests.tiny_world import make_batch, make_world
from trainer.errors import ConfigError
from trainer.models.baselines.aem import Aem, AemSettings
from trainer.models.baselines.hem import Hem, HemSettings
from trainer.models.baselines.qem import Qem, QemSettings
from trainer.models.baselines.tem import Tem, TemSettings
from trainer.models.baselines.zam import Zam, ZamSettings
from trainer.models.layers.nce import NoiseWords, nce, sampled_bce
from trainer.models.layers.text import draw_words

NUM_WORDS = 9


def test_words_are_drawn_from_the_text_and_nowhere_else():
    terms = torch.tensor([[5, 6, 0], [0, 0, 0], [7, 8, 9]])

    drawn = draw_words(terms, 200)

    assert [set(row.tolist()) for row in drawn] == [{5, 6}, {0}, {7, 8, 9}]
    assert draw_words(terms[:, :0], 2).tolist() == [[0, 0]] * 3


def test_noise_follows_frequency_to_three_quarters():
    noise = NoiseWords(4)
    noise.count(torch.tensor([[1, 1, 3]] * 8 + [[0, 0, 0]]).to(torch.uint16))

    share = torch.bincount(noise.draw(200, 100).flatten(), minlength=5) / 20_000

    expected = 16**0.75 / (16**0.75 + 8**0.75)
    assert share[[0, 2, 4]].eq(0).all()
    assert abs(share[1].item() - expected) < 0.02


def test_noise_is_uniform_before_words_are_counted_and_without_any():
    noise = NoiseWords(3)
    noise.count(torch.zeros(5, 2, dtype=torch.int32))

    assert set(noise.draw(200).tolist()) == {1, 2, 3}


def test_nce_is_the_cross_entropy_of_one_positive():
    scores = torch.tensor([[0.3, -2.0, 1.0]])

    assert torch.allclose(nce(scores[:, 0], scores[:, 1:]), sampled_bce(scores, torch.tensor([[1.0, 0, 0]])))


def test_an_item_without_words_has_no_text_loss_and_the_loss_falls():
    world = make_world(num_words=NUM_WORDS, num_negatives=2)
    world.tables.item_words[3] = 0
    model = Qem(QemSettings(dim=8, dropout=0.0), world)
    model.fit()
    batch = make_batch([[], []], torch.tensor([[3, 1, 2], [4, 5, 6]]), query=torch.tensor([0, 1]))

    assert (model.text_loss(batch) > 0).tolist() == [False, True]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_events_without_query_or_history_have_finite_scores_that_padding_does_not_change():
    model = Tem(TemSettings(dim=8, num_heads=2), make_world(num_words=NUM_WORDS)).eval()
    candidates = torch.tensor([[3, 1, 2], [4, 5, 6]])
    batches = [
        make_batch([[], [7, 8]], candidates, query=torch.tensor([-1, 1]), width=width) for width in (2, 6)
    ]

    narrow, wide = (model.score(batch) for batch in batches)

    assert narrow.isfinite().all()
    torch.testing.assert_close(narrow, wide, atol=1e-6, rtol=0)
    every = model.score_catalogue(batches[0]).gather(1, candidates)
    torch.testing.assert_close(every, narrow, atol=1e-5, rtol=0)


def test_history_may_be_that_of_searches_only():
    settings = TemSettings(dim=8, num_heads=2, history="src", history_length=2)
    model = Tem(settings, make_world(num_words=NUM_WORDS))
    batch = make_batch([[4, 5, 6, 7]], torch.tensor([[1, 2]]), tasks=[[SRC, SRC, 0, SRC]])

    assert model.history(batch).tolist() == [[6, 8]]


def test_a_user_given_by_hand_is_half_a_query_to_hem():
    model = Hem(HemSettings(dim=8), make_world(num_words=NUM_WORDS)).eval()
    torch.nn.init.ones_(model.core.users.weight[1:])
    batch = make_batch(
        [[], []], torch.tensor([[3, 1]] * 2), query=torch.tensor([1, 1]), user=torch.tensor([-1, 2])
    )

    unknown, known = model.question(batch)

    torch.testing.assert_close(unknown, model.core.encode_query(model.query_words(batch.query))[0] / 2)
    torch.testing.assert_close(known, unknown + 0.5)


@pytest.mark.parametrize(("kind", "settings"), [(Aem, AemSettings), (Zam, ZamSettings)])
@pytest.mark.parametrize("form", ["projected", "multihead"])
def test_attention_needs_no_history_and_reads_no_padding(kind, settings, form):
    model = kind(settings(dim=8, num_heads=2, form=form), make_world(num_words=NUM_WORDS)).eval()
    candidates, query = torch.tensor([[3, 1, 2], [4, 5, 6]]), torch.tensor([-1, 1])
    narrow, wide = (model.score(make_batch([[], [7]], candidates, query=query, width=w)) for w in (1, 6))

    assert narrow.isfinite().all()
    torch.testing.assert_close(narrow, wide, atol=1e-6, rtol=0)


def test_norms_are_in_the_loss_if_asked_and_refused_where_no_rank_has_a_table():
    world = make_world(num_words=NUM_WORDS)
    batch = make_batch([[4]], torch.tensor([[3, 1]]), query=torch.tensor([1]), user=torch.tensor([2]))
    settings = HemSettings(dim=8, l2=0.005)

    _, report = Hem(settings, world)(batch)

    assert float(report["norms"]) > 0
    assert "norms" not in Hem(HemSettings(dim=8), world)(batch)[1]
    assert Hem.refusals(settings, 3) == ["model.l2=0.005"]
    assert Hem.refusals(settings, 2) == Hem.refusals(HemSettings(), 3) == []


@pytest.mark.parametrize(
    ("model", "settings"),
    [(Aem, AemSettings(dim=8, form="multihead")), (Tem, TemSettings(dim=8, num_heads=5))],
)
def test_heads_that_do_not_divide_the_width_are_refused(model, settings):
    with pytest.raises(ConfigError, match=r"model\.dim=8 .* model\.num_heads=5"):
        model(settings, make_world(num_words=NUM_WORDS))
