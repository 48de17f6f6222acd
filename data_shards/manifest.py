"""What manifest.json must hold: names that stay inside the folder, checksums, numbers in range.

It is checked before anything that it names is opened or fetched.
"""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

CONFIG = ConfigDict(extra="allow", strict=True)  # also of the parts below
Rows = Annotated[int, Field(ge=0, lt=1 << 31)]  # ids are int32
Size = Annotated[int, Field(ge=0, lt=1 << 63)]
MAX_WIDTH = 1 << 20
Width = Annotated[int, Field(ge=0, lt=MAX_WIDTH)]  # of a matrix, or of a list in an event
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_FILE = r"[A-Za-z0-9_](\.?[A-Za-z0-9_-])*"  # becomes a path, and a part of commands
ShardName = Annotated[str, StringConstraints(pattern=rf"^shards/{_FILE}\.tar$")]
CatalogName = Annotated[str, StringConstraints(pattern=rf"^(catalog|tokenizer)/{_FILE}$")]


class ClickCounts(TypedDict):
    rec: Size
    src: Size


class Counts(TypedDict):
    users: Rows
    items: Rows
    queries: Rows
    train: ClickCounts
    valid: ClickCounts
    test: ClickCounts
    raw: NotRequired[dict[str, Size]]


class Settings(TypedDict):
    num_negatives: Width
    history_max: Width
    hard_negatives: NotRequired[Width]
    lowercase: NotRequired[bool]
    query_words: NotRequired[Width]


class Boundary(TypedDict):
    ms: int
    utc: str


class Split(TypedDict):
    rule: str
    boundaries: dict[str, Boundary]
    fingerprint: Sha256


class Text(TypedDict):
    mode: str
    tokenizer: NotRequired[str]
    num_words: Rows
    vocab_size: Rows
    item_tokens: Width
    query_tokens: Width


class ShardEntry(TypedDict):
    name: ShardName
    num_bytes: Size
    sha256: Sha256
    blocks: list[Rows]
    searches: NotRequired[list[Rows]]


class Shards(TypedDict):
    train: list[ShardEntry]
    valid: list[ShardEntry]
    test: list[ShardEntry]


class CatalogEntry(TypedDict):
    name: CatalogName
    num_bytes: Size
    sha256: Sha256


class RawFile(TypedDict):
    name: str
    num_bytes: Size


class Source(TypedDict):
    name: str
    files: NotRequired[list[RawFile]]
    license: NotRequired[str]
    category_separator: NotRequired[str]
    category_levels: NotRequired[dict[str, Size]]


class Removed(TypedDict):
    step: str
    round: NotRequired[Size]  # of the filter
    users: NotRequired[int]
    items: NotRequired[int]  # below 0 where items were added that nobody clicked
    queries: NotRequired[int]
    rec: NotRequired[int]
    src: NotRequired[int]


class Forebear(TypedDict):
    """A folder that this one goes on from: its identity, and how many rows it has given."""

    manifest: Sha256
    users: Rows
    items: Rows
    queries: Rows
    categories: Rows


class LeakCheck(TypedDict):
    checked: Size
    violations: Size


class Document(TypedDict):
    """manifest.json; README.md explains the keys. Further keys are fine."""

    __pydantic_config__ = CONFIG  # type: ignore[misc]

    format_version: int
    gensr_version: NotRequired[str]
    source: Source
    settings: Settings
    counts: Counts
    split: Split
    text: Text
    shards: Shards
    catalog: list[CatalogEntry]
    dropped: NotRequired[dict[str, Size]]
    removed: NotRequired[list[Removed]]
    published: NotRequired[dict[str, dict[str, Size]]]
    leak_checks: NotRequired[dict[str, LeakCheck]]
    appended: NotRequired[list[Forebear]]  # oldest first


_DOCUMENT = TypeAdapter(Document)


def manifest_problem(raw: Any) -> str:
    """The first key that is not what it should be, and why; "" for a sound document."""
    try:
        _DOCUMENT.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key, value = ".".join(str(part) for part in first["loc"]), first["input"]
        return (
            f"{key} is missing" if first["type"] == "missing" else f"{key}: {first['msg']}, got {value!r:.80}"
        )
    names = [entry["name"] for entry in raw["catalog"]]
    for split in ("train", "valid", "test"):
        for number, shard in enumerate(raw["shards"][split]):
            key = f"shards.{split}.{number}"
            names.append(shard["name"])
            searches = shard.get("searches", shard["blocks"])
            if len(searches) != len(shard["blocks"]):
                return f"{key}: {len(shard['blocks'])} blocks, but {len(searches)} numbers of searches"
            if any(some > of for some, of in zip(searches, shard["blocks"], strict=True)):
                return f"{key}.searches: more searches than events"
    twice = (
        next((name for name in names if names.count(name) > 1), None)
        if len(set(names)) < len(names)
        else None
    )
    return f"{twice} is listed twice" if twice else ""
