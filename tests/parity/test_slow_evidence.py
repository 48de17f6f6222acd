"""Evidence and mined negatives against slow_evidence.py, which shares no code with them: the numbers of
every event and item, the model that reads them, and what is mined and how its scores are corrected."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from data_shards.prepare import prepare
from data_shards.schema import SRC
from tests.conftest import SMALL
from tests.parity.beside_slow import (
    NUM_FOLDS,
    SETTINGS,
    compare,
    disturb,
    events_of,
    slow,
    tables_of,
    telling,
    with_cf,
)
from tests.parity.slow_evidence import Catalogue, SlowEvidence
from tests.worlds import write_tables
from trainer.batch import Batch
from trainer.configs import load_config
from trainer.data import TrainStream
from trainer.data.folder import PreparedFolder
from trainer.models.gensr.mining import log_proposal
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import build_model

NEIGHBOURS, NEGATIVES, MINED = 6, 6, 4
TIED = 12 * 3_600_000  # ms whose clicks become one moment


@dataclass(frozen=True)
class Both:
    """One new model and its reference, on the same prepared folder."""

    folder: PreparedFolder
    model: GenSR
    reference: SlowEvidence

    def batch(self, num_events: int = 64) -> Batch:
        """Of training, with folds."""
        stream = TrainStream(
            self.folder, self.model.world.data, 0, num_events, num_events, num_folds=NUM_FOLDS
        )
        return next(iter(stream))


@pytest.fixture(scope="module", params=["text", "words"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """text: queries that are the words of a category, of its first level or of both, and of none; every
    fourth click is a search and a recommendation of one moment. words: anonymised words, which name no
    category. In both, clicks of one moment."""
    place = tmp_path_factory.mktemp("evidence")
    raw = write_tables(place / "raw", items=90, anonymised=request.param == "words")
    add_rare_items(raw)
    tie(raw)
    if request.param == "text":
        file_in_categories(raw)
    prepare("tables", raw, place / "prepared", (*SMALL, "num_negatives=20"))
    folder = PreparedFolder.at(with_cf(place / "prepared", place / "data"))
    chosen = [
        *SETTINGS[:-3],
        f"data.num_negatives={NEGATIVES}",
        "data.weight_rec=0.7",
        "data.weight_src=1.6",
        "model.backbone=scratch:nano",
        "model.evidence=true",
        f"model.evidence_categories={request.param == 'text'}",
        "model.evidence_queries=true",
        f"model.num_neighbours={NEIGHBOURS}",
        f"model.mined_negatives={MINED}",
    ]
    torch.manual_seed(0)
    config = load_config(None, chosen)
    model = build_model(config, folder, folder.tables(GenSR.needs, with_folds=True)).train()
    assert isinstance(model, GenSR)
    model.fit()
    disturb(model)
    return Both(folder, model, reference_of(folder, model))


def add_rare_items(raw: Path) -> None:
    """Five that are clicked for the first time at the very end, in the test split; and three that nobody but
    a dozen users clicks, who click no others: items with two neighbours. Some texts hold a word twice."""
    events = [json.loads(line) for line in (raw / "events.jsonl").read_text().splitlines()]
    items = [json.loads(line) for line in (raw / "items.jsonl").read_text().splitlines()]
    times = [event["time"] for event in events]
    click = next(event for event in events if event["task"] == "rec" and event["clicked"])
    for number in range(5):
        items.append({**items[number], "item_id": f"new{number}"})
        new = {"user_id": f"u{number}", "item_id": f"new{number}", "time": max(times) + number}
        events.append({**click, **new})
    for number in range(3):
        items.append({**items[number], "item_id": f"rare{number}"})
    for user in range(12):
        for number in range(8):
            rare = {"user_id": f"rare{user}", "item_id": f"rare{number * (user + 1) % 3}"}
            events.append({**click, **rare, "time": min(times) + 1000 * number})
    for item in items[::3]:
        item["text"] += f" {item['text'].split()[0]}"
    for name, rows in (("items", items), ("events", events)):
        (raw / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tie(raw: Path) -> None:
    """Every third user's clicks come several at a time."""
    events = [json.loads(line) for line in (raw / "events.jsonl").read_text().splitlines()]
    for event in events:
        if event["user_id"].startswith("u") and int(event["user_id"][1:]) % 3 == 0:
            event["time"] -= event["time"] % TIED
    (raw / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def file_in_categories(raw: Path) -> None:
    """Items get two levels, one topic the other way round: two categories of the same words."""
    paths = {}
    lines = [json.loads(line) for line in (raw / "items.jsonl").read_text().splitlines()]
    for number, item in enumerate(lines):
        topic, kind = item["text"].split()[:2]
        reverse = topic == "garden" and number % 2
        path = [] if number % 17 == 0 else [kind, topic] if reverse else [topic, kind]
        item["category"] = path = path[: 1 + (number % 5 > 0)]
        paths[item["item_id"]] = path
    (raw / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    events = []
    for number, line in enumerate((raw / "events.jsonl").read_text().splitlines()):
        event = json.loads(line)
        path = paths[event["item_id"]]
        if event["task"] == "src" and path and event["clicked"]:
            event["query"] = " ".join([path, path[:1], path[::-1], [path[0], path[0], "lamp"]][number % 4])
        events.append(event)
        if event["clicked"] and number % 4 == 0:
            query = event["query"] or "number"
            other = {"task": "rec", "query": None} if event["task"] == "src" else {"task": "src"}
            events.append({**event, "query": query, **other})
    (raw / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def reference_of(folder: PreparedFolder, model: GenSR) -> SlowEvidence:
    tables, clicks = tables_of(folder.path, model), model.world.clicks()
    words, levels = model.world.num_words > 0, model.tables.item_category.tolist()
    catalogue = Catalogue(
        item_terms=tables.item_words if words else tables.item_tokens,
        query_terms=tables.query_words if words else tables.query_tokens,
        query_tokens=tables.query_tokens,
        item_categories=levels if levels[0] else [[0]] * len(levels),
        category_tokens={} if words else category_tokens(folder, model),
    )
    columns = (clicks.user, clicks.item, clicks.time, clicks.task, clicks.query)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    settings = model.settings
    return SlowEvidence(rows, catalogue, NEIGHBOURS, settings.evidence_categories, settings.evidence_queries)


def category_tokens(folder: PreparedFolder, model: GenSR) -> dict[int, list[int]]:
    """The words of all levels, each once, as the tokenizer reads them; of the file that preparation wrote."""
    rows = pq.read_table(folder.path / "catalog" / "categories.parquet").to_pylist()
    paths: dict[int, list[str]] = {0: []}
    for row in rows:
        paths[row["id"]] = [*paths[row["parent"]], row["name"]]
    assert model.world.tokenizer is not None
    encode = model.world.tokenizer()
    return {
        number: encode(" ".join(dict.fromkeys(" ".join(path).split())), add_special_tokens=False)["input_ids"]
        for number, path in paths.items()
        if path
    }


def expected_numbers(both: Both, batch: Batch, own: bool) -> torch.Tensor:
    tables = tables_of(both.folder.path, both.model)
    rows = []
    for event in events_of(batch):
        history = [item for item, _ in event.history]
        cf = tables.cf_folds[event.fold] if own and event.fold >= 0 else tables.cf
        rows.append(
            [
                both.reference.numbers(
                    history,
                    event.query,
                    candidate,
                    cf.__getitem__,
                    event.candidates[event.clicked] if own else -1,
                )
                for candidate in event.candidates
            ]
        )
    return torch.tensor(rows)


def of_every_item(batch: Batch, num_items: int) -> Batch:
    """All items as candidates; the clicked one stays labelled."""
    clicked = batch.candidates.gather(1, batch.labels.argmax(1, keepdim=True))
    items = torch.arange(num_items).expand(batch.num_events, -1)
    return batch.with_candidates(items.contiguous(), (items == clicked).float())


def test_counts(both: Both) -> None:
    """Whole tables: the nearest of every item, with the values beside them, and idf."""
    evidence, slow_ = both.model.evidence, both.reference
    assert evidence is not None
    assert evidence.users.tolist() == slow_.users and evidence.clicks.tolist() == slow_.clicks
    for names, values, expected in (
        (evidence.near, evidence.near_users, slow_.near),
        (evidence.follow, evidence.follow_weight, slow_.follow),
    ):
        assert max(map(len, expected)) == NEIGHBOURS
        for item, row in enumerate(expected):
            real = names[item] < slow_.num_items
            assert dict(zip(names[item][real].tolist(), values[item][real].tolist(), strict=True)) == row
            assert names[item].tolist() == sorted(names[item].tolist())  # looked up by bisection
    for term, value in slow_.idf.items():
        assert float(evidence.idf[term]) == pytest.approx(value if term else 0.0, rel=1e-6)


@pytest.mark.parametrize("own", [True, False], ids=["training", "evaluation"])
def test_numbers_of_every_item(both: Both, own: bool) -> None:
    """own: of training events, whose click is among the counts and is taken out, with the CF table of their
    fold."""
    batch = of_every_item(both.batch(24), both.folder.manifest.num_items)
    both.model.train(own)
    seen = both.model.seen(batch, own)
    assert seen is not None
    expected = expected_numbers(both, batch, own)
    torch.testing.assert_close(seen.features_BCF, expected, rtol=0, atol=2e-5)
    assert [name for name in range(expected.shape[2]) if not expected[..., name].any()] == (
        [] if both.reference.catalogue.category_tokens else [10, 11]
    )


def test_searches_alone_or_all_events_are_looked_up_alike(both: Both) -> None:
    """On a CPU what a query's words mean is computed of searches only, elsewhere of all rows."""
    batch, evidence = both.batch(48), both.model.evidence
    assert evidence is not None and evidence.query_words is not None
    words = evidence.query_words
    meaning = words(batch, both.model.tables, own=True)
    asked = (batch.query >= 0)[:, None]
    assert torch.equal(meaning, words._meaning(batch, both.model.tables, own=True) * asked)
    assert (
        meaning[asked[:, 0]].abs().min() > 0
        and not words(batch.take(~asked[:, 0]), both.model.tables, True).any()
    )


def test_a_models_scores_losses_and_gradients(both: Both) -> None:
    """With the evidence slot, its log-odds, mined negatives and their correction."""
    model = both.model.train()
    model.zero_grad()
    batch = telling(both.batch(192))
    changed = model._with_mined(batch)
    assert not torch.equal(changed.candidates, batch.candidates)
    compare(model, slow(model, both.folder.path, evidence=both.reference), batch, changed)


# ---- mined negatives ---------------------------------------------------------------------------------------


def test_what_is_mined_is_allowed(both: Both) -> None:
    model, reference = both.model.train(), both.reference
    batch = both.batch(256)
    places = torch.arange(batch.num_events) % batch.candidates.shape[1]  # the click may stand anywhere
    batch = moved_click(batch, places)
    # without clicks of the user to look up, the history alone says what may not be mined
    batch = replace(batch, user=batch.user.where(torch.arange(batch.num_events) % 2 == 0, -1))
    changed = model._with_mined(batch)
    assert torch.equal(changed.labels, batch.labels)
    assert torch.equal(changed.candidates, model._with_mined(batch).candidates)
    fixed = batch.candidates.shape[1] - MINED
    assert torch.equal(changed.candidates[:, :fixed], batch.candidates[:, :fixed])
    exchanged = different = from_category = 0
    for event, before in zip(events_of(changed), batch.candidates.tolist(), strict=True):
        history = [item for item, _ in event.history]
        allowed = reference.mined(history, event.query).keys()
        refused = reference.no_negatives(event.user, history, event.candidates[event.clicked])
        assert event.candidates[event.clicked] == before[event.clicked]
        different += len(set(event.candidates) - set(before))
        for item, drawn in zip(event.candidates, before, strict=True):
            if item != drawn:
                assert item in allowed and item not in refused
                exchanged += 1
                from_category += bool(reference.category_items(event.query))
    assert exchanged > batch.num_events and different > 0.6 * exchanged  # each place draws for itself
    assert bool(from_category) == bool(reference.catalogue.category_tokens)


def test_mined_items_come_as_often_as_the_correction_says(both: Both) -> None:
    """One event of each kind, drawn many times; items that may not be mined leave the uniform draw."""
    model, reference = both.model.train(), both.reference
    batch = both.batch(256)
    events = events_of(batch)
    chosen = [next(n for n, event in enumerate(events) if event.task != SRC and len(event.history) > 2)]
    sizes = [len(reference.category_items(event.query)) for event in events]
    chosen += [sizes.index(max(sizes))] if any(sizes) else []
    for place in chosen:
        event, repeats = events[place], 20_000
        many = batch.take(torch.full((repeats,), place))
        many = replace(many, event_id=torch.arange(repeats))
        # one uniform draw that is no item of the others: what replaces it was mined
        history = [item for item, _ in event.history]
        draws = reference.mined(history, event.query)
        refused = reference.no_negatives(event.user, history, event.candidates[event.clicked])
        idle = next(item for item in range(reference.num_items) if item not in draws)
        drawn = torch.full_like(many.candidates, idle)
        drawn[:, 0] = event.candidates[event.clicked]
        changed = model._with_mined(many.with_candidates(drawn, many.labels)).candidates[:, -MINED:]
        for item in range(reference.num_items):
            share = float((changed == item).float().mean())
            expected = 0.0 if item in refused else draws.get(item, 0.0)
            if item != idle:
                assert share == pytest.approx(expected, abs=0.012), (place, item)


def test_the_correction_of_every_item(both: Both) -> None:
    """log(q · items), the clicked item as if its click had not been counted."""
    model, reference, num_items = both.model.train(), both.reference, both.folder.manifest.num_items
    batch = of_every_item(both.batch(64), num_items)
    model._with_mined(both.batch(8))  # opens what is mined from
    seen = model.seen(batch, own=True)
    assert seen is not None and model.evidence is not None
    share = MINED / NEGATIVES
    ours = log_proposal(batch, seen, share, model.evidence, model._mine[0], model.tables)
    expected = [
        [
            math.log(
                reference.proposal(
                    [item for item, _ in event.history], event.query, item, place == event.clicked, share
                )
            )
            for place, item in enumerate(event.candidates)
        ]
        for event in events_of(batch)
    ]
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=0, atol=1e-5)


def moved_click(batch: Batch, places: torch.Tensor) -> Batch:
    """The clicked candidate exchanged with the one at its event's place."""
    candidates, labels = batch.candidates.clone(), torch.zeros_like(batch.labels)
    rows = torch.arange(batch.num_events)
    clicked = batch.labels.argmax(1)
    candidates[rows, clicked] = batch.candidates[rows, places]
    candidates[rows, places] = batch.candidates[rows, clicked]
    labels[rows, places] = 1
    return batch.with_candidates(candidates, labels)
