"""A manifest that is not what it should be gives one DataError that names the key, whatever was changed."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import DataError
from data_shards.inspect import describe, inspect
from data_shards.schema import SPLITS, parse_manifest, read_manifest

WRONG: tuple[Any, ...] = (
    *(None, True, -1, 1.5, "1", 10**30, float("nan")),
    *([], {}, [None], {"a": 1}),
    *("\ud83d", "../../victim", "shards/../x.tar"),
)


def keys_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, from the outside in; of a list the first entry only."""
    if path:
        yield path
    entries = (
        value.items()
        if isinstance(value, dict)
        else list(enumerate(value))[:1]
        if isinstance(value, list)
        else ()
    )
    for key, inner in entries:
        yield from keys_of(inner, (*path, key))


def changed(raw: dict[str, Any], path: tuple[Any, ...], *value: Any) -> bytes:
    """The document with the value at `path` replaced, or left out."""
    raw = copy.deepcopy(raw)
    place: Any = raw
    for key in path[:-1]:
        place = place[key]
    if value:
        place[path[-1]] = value[0]
    else:
        del place[path[-1]]
    return json.dumps(raw).encode()


def use(content: bytes) -> None:
    """What programs read from a manifest."""
    manifest = parse_manifest(content, "m.json")
    for split in SPLITS:
        manifest.num_events(split)
    numbers = (manifest.num_items, manifest.num_users, manifest.num_queries, manifest.num_words)
    assert all(
        type(number) is int and number >= 0
        for number in (*numbers, manifest.num_negatives, manifest.history_max)
    )
    assert len(manifest.fingerprint) == 64


def test_hundreds_of_changed_manifests_give_no_traceback(prepared: Path) -> None:
    raw = json.loads((prepared / "manifest.json").read_text())
    tried, messages = 0, []
    for path in keys_of(raw):
        for value in ((), *((wrong,) for wrong in WRONG)):
            tried += 1
            try:
                use(changed(raw, path, *value))
            except DataError as error:
                messages.append(str(error))
    assert tried > 1000 and len(messages) > 600
    assert all(message.startswith("m.json") for message in messages)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"5", b"null", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000),
        *(b'{"format_version": 2}', b'{"format_version": 1e999}'),
        b'{"format_version": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_manifest_at_all(content: bytes) -> None:
    with pytest.raises(DataError, match=r"m\.json"):
        parse_manifest(content, "m.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("shards", "train", 0, "name"), "shards/../x.tar", r"shards\.train\.0\.name: "),
        (("shards", "train", 0, "name"), "/etc/x.tar", r"shards\.train\.0\.name: "),
        (("shards", "train", 0, "name"), "catalog/x.tar", r"shards\.train\.0\.name: "),
        (("shards", "train", 0, "name"), "shards/a\n.tar", r"shards\.train\.0\.name: "),
        (("shards", "train", 0, "name"), "shards/$(id).tar", r"shards\.train\.0\.name: "),
        (("catalog", 0, "name"), "catalog/..", r"catalog\.0\.name: "),
        (("catalog", 0, "name"), "cf/lightgcn.safetensors", r"catalog\.0\.name: "),
        (("catalog", 0, "sha256"), "A" * 64, r"catalog\.0\.sha256: "),
        (("catalog", 0, "sha256"), "a" * 63, r"catalog\.0\.sha256: "),
        (("catalog", 0, "num_bytes"), "5", r"catalog\.0\.num_bytes: .* got '5'"),
        (("counts", "items"), 2**31, r"counts\.items: "),
        (("counts", "items"), True, r"counts\.items: "),
        (("shards", "train", 0, "blocks"), [1, -1], r"shards\.train\.0\.blocks\.1: "),
        (("shards", "train", 0, "searches"), [1], r"shards\.train\.0: \d+ blocks, but 1 numbers of searches"),
    ],
)
def test_the_key_is_named(prepared: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    raw = json.loads((prepared / "manifest.json").read_text())
    with pytest.raises(DataError, match=r"m\.json: " + message):
        parse_manifest(changed(raw, path, value), "m.json")


def test_a_name_listed_twice_is_refused(prepared: Path) -> None:
    raw = json.loads((prepared / "manifest.json").read_text())
    raw["catalog"].append({**raw["catalog"][0], "sha256": "0" * 64})
    with pytest.raises(DataError, match="is listed twice"):
        parse_manifest(json.dumps(raw).encode(), "m.json")


def test_further_keys_are_fine_and_facts_for_people_may_be_missing(prepared: Path, tmp_path: Path) -> None:
    raw = json.loads((prepared / "manifest.json").read_text())
    manifest = parse_manifest(json.dumps({**raw, "mine": [1]}).encode(), "m.json")
    assert manifest.raw["mine"] == [1] and manifest.hash != read_manifest(prepared).hash
    (tmp_path / "out").mkdir()
    for part in ("shards", "catalog", "tokenizer"):
        (tmp_path / "out" / part).symlink_to(prepared / part)
    for key in ("published", "dropped", "leak_checks", "gensr_version", "seeds"):
        raw.pop(key)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(raw))
    assert describe(inspect(tmp_path / "out"))
