"""What a registered version holds of the prepared folder: item tables, original ids and texts, how queries
are
read. FOLDER/tables.safetensors  items.parquet  words.npy  serving.json  files.json (runs/sealed.py)"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file

from data_shards.schema import Manifest
from trainer.batch import ItemTables, no_tables
from trainer.errors import RunError
from trainer.runs.sealed import check_sealed, seal

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from data_shards.text import Words
    from trainer.serving.scorer import Scorer

# what describes items; queries are encoded as they come
TABLE_NAMES = ("cf", "item_tokens", "item_words", "item_category")


@dataclass(frozen=True)
class QueryFormat:
    """How a query becomes rows of ItemTables.query_*: the settings of the prepared folder that the model was
    trained on."""

    mode: str  # natural, words, digits or drop (data_shards/text.py)
    query_tokens: int
    query_words: int
    lowercase: bool


def query_format(manifest: Manifest) -> QueryFormat:
    text, settings = manifest.raw["text"], manifest.raw["settings"]
    lowercase = bool(settings.get("lowercase", False))
    return QueryFormat(text["mode"], text["query_tokens"], settings.get("query_words", 0), lowercase)


def read_words(path: Path, form: QueryFormat) -> "Words":
    """The anonymised words of a catalogue, sorted; word id = position + 1."""
    from data_shards.text import Words

    return Words(np.load(path, allow_pickle=False) if form.mode == "words" else np.zeros(0, np.int64))


def load_fast_tokenizer(model_dir: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model_dir / "tokenizer" / "tokenizer.json"))


def write_items(folder: Path, scorer: "Scorer", items: pa.Table, facts: Mapping[str, Any]) -> None:
    """What a registered version needs of the prepared folder: the item tables that the model reads (without
    the cross-fitting folds), `items` (original ids and, for answers, texts: columns item_id and text), how
    to read queries, the precision. `facts` are kept beside them in serving.json."""
    folder.mkdir(parents=True)
    tables = {name: getattr(scorer.model.tables, name) for name in TABLE_NAMES}
    held = {name: table.contiguous().cpu() for name, table in tables.items() if table.numel()}
    save_file(held, folder / "tables.safetensors")
    pq.write_table(items, folder / "items.parquet")
    if scorer.query_format.mode == "words":
        np.save(folder / "words.npy", scorer.words.vocabulary)
    form = dataclasses.asdict(scorer.query_format)
    document = {**facts, "precision": scorer.precision, "query_format": form}
    (folder / "serving.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    seal(folder)


def read_serving_facts(folder: Path) -> dict[str, Any]:
    """serving.json of what write_items wrote. Raises RunError when FOLDER is something else, DataError when
    a file of it is not the one that was written."""
    path = folder / "serving.json"
    if not path.is_file():
        raise RunError(f"{folder.parent} holds no registered model ({path} is missing)")
    check_sealed(folder)
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def read_tables(folder: Path) -> ItemTables:
    held = load_file(folder / "tables.safetensors")
    cf = held.get("cf")
    num_items = pq.ParquetFile(folder / "items.parquet").metadata.num_rows
    empty = no_tables(num_items, num_queries=1, cf_dim=cf.shape[1] if cf is not None else 0)
    return dataclasses.replace(empty, **held)


def read_item_ids(path: Path) -> list[Any]:
    ids: list[Any] = pq.read_table(path, columns=["item_id"])["item_id"].to_pylist()
    return ids
