"""The world in natural words: the clicks of the anonymised one, titles and queries that say what is planted,
files that `gensr prepare tables` reads."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from data_shards.errors import ConfigError
from data_shards.prepare import prepare
from data_shards.simulate import behaviour as b
from data_shards.simulate import natural, simulate
from data_shards.simulate.lexicon import Attribute, Kind, _grammar, make_kinds
from data_shards.simulate.simulated import Simulated
from data_shards.simulate.world import World, make_world

SMALL: dict[str, Any] = {"users": 80, "items": 600, "days": 5, "seed": 3}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("natural") / "raw"
    simulate(out, **SMALL, text="natural")
    return out


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SMALL["users"], 4000, SMALL["days"], SMALL["seed"])


def rows(table: pa.Table) -> list[tuple[Any, ...]]:
    return sorted(zip(*table.to_pydict().values(), strict=True))


# ---- files -------------------------------------------------------------------------------------------------


def test_the_clicks_are_those_of_the_anonymised_world(raw: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "raw", **SMALL)
    events = pa_csv.read_csv(raw / "events.csv")
    rec = pa_csv.read_csv(tmp_path / "raw" / "rec_inter.csv")
    src = pa_csv.read_csv(tmp_path / "raw" / "src_inter.csv")
    src = src.filter(pa.compute.equal(src["item_type"], "VIDEO"))
    src = src.append_column("clicked", pa.compute.min_element_wise(src["click_cnt"], 1))
    rec = rec.set_column(5, "timestamp", rec["timestamp"].cast(pa.int64()))
    columns = ["user_id", "item_id", "time", "clicked"]
    for task, anonymised in (
        ("rec", rec.select(["user_id", "item_id", "timestamp", "click"])),
        ("src", src.select(["user_id", "item_id", "search_session_timestamp", "clicked"])),
    ):
        mine = events.filter(pa.compute.equal(events["task"], task))
        assert rows(mine.select(columns)) == rows(anonymised)
        assert set(mine["query"].to_pylist()).isdisjoint({""}) == (task == "src")
    items = pa_csv.read_csv(tmp_path / "raw" / "item_features.csv")
    assert pa_csv.read_csv(raw / "items.csv")["item_id"].equals(items["item_id"])


def test_the_folder_holds_two_tables_and_the_arguments(raw: Path) -> None:
    assert sorted(path.name for path in raw.iterdir()) == ["events.csv", "items.csv", "simulated.json"]
    assert Simulated.read(raw) == Simulated(**SMALL, rows_per_day=24.0, text="natural")


@pytest.mark.parametrize("chunk_users", [1, 17])
def test_same_bytes_whatever_the_chunking(raw: Path, tmp_path: Path, chunk_users: int) -> None:
    simulate(tmp_path / "raw", **SMALL, text="natural", chunk_users=chunk_users)
    for path in raw.iterdir():
        assert path.read_bytes() == (tmp_path / "raw" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"text": "latin"}, "text must be anonymised or natural"), ({"items": 5001}, "items must be .* 5,000")],
)
def test_what_cannot_be_said_is_refused(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(tmp_path / "raw", **(SMALL | {"text": "natural"} | arguments))
    assert not list(tmp_path.iterdir())


def test_prepare_reads_it_as_natural_text(raw: Path, tmp_path: Path) -> None:
    manifest = prepare("tables", raw, tmp_path / "data", ["min_interactions=2"])
    assert manifest.raw["text"]["mode"] == "natural"
    items = pq.read_table(tmp_path / "data" / "catalog" / "items.parquet").to_pylist()
    written = {row["item_id"]: row for row in pa_csv.read_csv(raw / "items.csv").to_pylist()}
    assert all(row["text"] == written[row["item_id"]]["text"] for row in items)
    levels = pq.read_table(tmp_path / "data" / "catalog" / "categories.parquet")["level"].to_pylist()
    assert set(levels) == {0, 1, 2}
    asked = set(pa_csv.read_csv(raw / "events.csv")["query"].to_pylist())
    queries = pq.read_table(tmp_path / "data" / "catalog" / "queries.parquet")["text"].to_pylist()
    assert set(queries) <= asked
    assert len(queries) > 50


# ---- words -------------------------------------------------------------------------------------------------


def test_a_phrase_is_in_english_order() -> None:
    attributes = (
        Attribute(9, ("with hook", "with hanger")),
        Attribute(6, ("steel", "metal")),
        Attribute(1, ("small", "compact")),
    )
    kind = Kind(
        ("garden trowel", "hand spade"), (), (), ("Garden", "Hand tools", "Garden trowel"), attributes
    )
    assert kind.phrase([0, 1, 2], [0, 0, 1], 0) == "compact steel garden trowel with hook"
    assert kind.phrase([1, 1], [1, 0], 1) == "metal hand spade"  # said once, as it came first
    assert kind.phrase([], [], 1) == "hand spade"


def test_titles_say_the_kind_and_the_concepts_and_differ(world: World) -> None:
    items = np.arange(world.num_items)
    titles = natural.titles(world, items)
    kinds = make_kinds(world)
    topic = world.topic_of(items)
    for title, t, concepts in zip(titles, topic, world.concepts[items].tolist(), strict=True):
        said = title[0].lower() + title[1:] if not title.startswith("USB") else title
        assert any(noun in said for noun in kinds[t].nouns)
        for concept in concepts:
            assert any(word in said for word in kinds[t].attributes[concept].forms)
    assert len(set(titles)) > 0.98 * len(titles)
    assert 3 < np.mean([len(title.split()) for title in titles]) < 9


def test_the_words_of_one_seed_stay() -> None:
    world = make_world(80, 4000, 5, seed=1)
    assert natural.titles(world, np.arange(3)) == [
        "Weatherproof kids' garden trowel, Oakhurst, 25 cm",
        "Cheap large sturdy garden trowel, Tilling, 30 cm",
        "Large robust junior hand spade, 30 cm",
    ]


def test_a_query_names_its_topic_and_matches_several_items(world: World) -> None:
    log = b.make_log(world, 0, world.num_users, 24.0)
    queries = natural.queries(world, log.searches)
    kinds = make_kinds(world)
    titles = [title.lower() for title in natural.titles(world, np.arange(world.num_items))]
    plain, matches = 0, []
    for query, topic in zip(queries, log.searches.topic, strict=True):
        nouns = [noun for noun in kinds[topic].nouns if noun in query]
        assert nouns, (query, kinds[topic])
        plain += query in kinds[topic].nouns
        matches.append(sum(all(word in title for word in query.lower().split()) for title in titles))
    assert 0.08 < plain / len(queries) < 0.16  # "garden trowel", with nothing before or after
    assert np.mean(np.array(matches) > 1) > 0.3
    assert 0.2 < np.mean(np.array(matches) == 0) < 0.7  # other words for the same: matching is not enough


def test_the_second_level_shares_the_words_of_shared_concepts(world: World) -> None:
    kinds = make_kinds(world)
    assert world.num_shared_concepts == 1
    second = world.second_of(np.arange(world.num_topics))
    for s in np.unique(second):
        assert len({kinds[t].attributes[0] for t in np.flatnonzero(second == s)}) == 1
    assert len({kind.attributes for kind in kinds}) == world.num_topics


# ---- the grammar -------------------------------------------------------------------------------------------


def test_every_word_has_two_forms_and_every_noun_means_one_kind() -> None:
    nouns, lines = [], []
    for department in _grammar().values():
        lines += department["attributes"]
        for kinds in department["sections"].values():
            nouns += list(kinds)
            assert all(len(set(sizes)) >= 3 for sizes in kinds.values())
    assert len(nouns) == 72
    for entry in [*nouns, *itertools.chain(*lines)]:
        assert len(set(entry.split("/"))) == 2, entry
        assert not set(entry) & set('",\n'), entry
    forms = list(itertools.chain(*(noun.split("/") for noun in nouns)))
    assert len(set(forms)) == len(forms)


@pytest.mark.parametrize("items", [200, 1000, 2500, 4150, natural.MAX_ITEMS])
def test_every_world_up_to_the_limit_has_words(items: int) -> None:
    world = make_world(10, items, 3, seed=items)
    kinds = make_kinds(world)
    assert len({kind.path for kind in kinds}) == world.num_topics
    assert all(len(set(kind.attributes)) == world.num_concepts for kind in kinds)
