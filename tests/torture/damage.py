"""Damage to one file, by a seeded generator: to its bytes, or to one place of a document."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

DEEP = 3000  # nested lists: more than Python's stack takes


def damage_bytes(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(what was done, the new content)."""
    size = len(content)
    at = rng.randrange(size + 1)
    length = rng.randrange(1, max(2, min(size // 4, 4096) + 1))
    part = content[at : at + length]
    kinds: list[tuple[str, Callable[[], bytes]]] = [
        ("a flipped bit", lambda: _flipped(content, rng)),
        (f"cut at {at}", lambda: content[:at]),
        ("empty", lambda: b""),
        (
            f"zeros at {at}",
            lambda: content[:at] + bytes(len(part)) + content[at + length :],
        ),
        (f"noise at {at}", lambda: content[:at] + rng.randbytes(length) + content[at + length :]),
        (f"{length} bytes more at {at}", lambda: content[:at] + rng.randbytes(length) + content[at:]),
        (f"{length} bytes fewer at {at}", lambda: content[:at] + content[at + length :]),
        ("twice", lambda: content + content),
    ]
    name, change = rng.choice(kinds)
    return name, change()


def _flipped(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return content
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, 10**400),
    *(0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", " ", "x", "0", "1e9", "nan", "../../../x", "/etc/passwd", "a\x00b", "a\nb", "\ud800", "é" * 300),
    *("http://127.0.0.1:9/x?token=s3cret", "pipe:false {}", "file:///x"),
    *([], [0], [[]], {}, {"a": 1}, [None]),
)


def damage_document(tree: Any, rng: random.Random) -> tuple[str, Any]:
    """One place of a nested document: another value, removed, doubled, or a key more. Changes `tree`."""
    places = list(_places(tree, ()))
    path = rng.choice(places)
    parent = tree
    for part in path[:-1]:
        parent = parent[part]
    key = path[-1]
    kind = rng.choice(("value", "value", "value", "value", "removed", "near", "swapped", "more", "deep"))
    if kind == "removed":
        del parent[key]
    elif kind == "near" and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        parent[key] += rng.choice((-1, 1, -1000, 1000))
    elif kind == "near" and isinstance(parent[key], str) and parent[key]:
        parent[key] = _flipped(parent[key].encode(), rng).decode("utf-8", "replace")
    elif kind == "swapped":
        parent[key] = _at(tree, rng.choice(places))
    elif kind == "more" and isinstance(parent, dict):
        kind, parent[rng.choice(("x", "files", "name", ""))] = "a key more", rng.choice(VALUES)
    elif kind == "deep":
        value: Any = 0
        for _ in range(rng.choice((3, DEEP))):
            value = [value]
        parent[key] = value
    else:
        kind, parent[key] = "value", rng.choice(VALUES)
    return f"{'.'.join(map(str, path))}: {kind}", tree


def _places(tree: Any, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, child in children for place in [(*path, key), *_places(child, (*path, key))]]


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return json.loads(json.dumps(tree)) if isinstance(tree, dict | list) else tree


def damage_file(path: Path, rng: random.Random) -> str:
    """Damages one file in place; JSON and YAML mostly as documents. → what was done."""
    content = path.read_bytes()
    if rng.random() < 0.04:
        path.unlink()
        return f"{path.name}: deleted"
    reader: Any = {".json": json.loads, ".yaml": yaml.safe_load}.get(path.suffix)
    if reader is not None and len(content) < 1 << 20 and rng.random() < 0.75:
        tree = reader(content)
        if isinstance(tree, dict) and tree:
            done, tree = damage_document(tree, rng)
            path.write_text(written(tree), encoding="utf-8", errors="surrogatepass")
            return f"{path.name}: {done}"
    if path.suffix == ".jsonl" and rng.random() < 0.75:
        lines = content.decode().splitlines()
        number = rng.randrange(len(lines))
        done, tree = damage_document(json.loads(lines[number]), rng)
        lines[number] = written(tree)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
        return f"{path.name}: line {number}: {done}"
    done, content = damage_bytes(content, rng)
    path.write_bytes(content)
    return f"{path.name}: {done}"


def written(tree: Any) -> str:
    """As JSON, which YAML readers take, too; deeper than json.dumps goes."""
    try:
        return json.dumps(tree)
    except RecursionError:
        return _written_deep(tree)


def _written_deep(tree: Any) -> str:
    """Nested lists of one element without recursion; the documents around them are shallow."""
    if isinstance(tree, dict):
        return (
            "{" + ", ".join(f"{json.dumps(key)}: {_written_deep(value)}" for key, value in tree.items()) + "}"
        )
    depth = 0
    while isinstance(tree, list) and len(tree) == 1:
        tree, depth = tree[0], depth + 1
    if isinstance(tree, list):
        inner = "[" + ", ".join(map(_written_deep, tree)) + "]"
    else:
        inner = _written_deep(tree) if isinstance(tree, dict) else json.dumps(tree)
    return "[" * depth + inner + "]" * depth
