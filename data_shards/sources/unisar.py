"""`unisar`: the preprocessed data that UniSAR's authors give out (Shi et al., SIGIR 2024), for Amazon and for
KuaiSAR, so that UniSAR, the papers that use it and gensr rank the same candidates.

RAW holds dataset/{rec,src}_{train,val,test}.pkl, data frames of predictions with their negatives, and vocab/
with user_vocab.pkl (what each user clicked and searched, with times), src_session_vocab_np.pkl (query and
clicks of each search) and item_vocab_np.pkl (words and categories of items, for KuaiSAR). They are pickles: a
process of its own reads them with data_shards/pickled.py, which runs nothing in them.

With split=stored, the default, the events of a split and their negatives are those of dataset/. A click of a
user's lists that is no row of dataset/ is in histories only. Histories follow gensr's rule, clicks at earlier
times, unless history_rule=count asks for UniSAR's: the first rec_his clicks and src_session_his searches of
the lists, whatever their times, merged by time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_shards.errors import DataError
from data_shards.options import PrepareSettings
from data_shards.sources import ItemSql, Source, StoredSql, Tables
from data_shards.sources.amazon import KINDLE
from data_shards.sources.kuaisar import PUBLISHED as KUAISAR
from data_shards.sources.unisar_tables import FILES, TASK_NAMES
from data_shards.sql import parquet_scan
from data_shards.work import Work

LICENSE = "that of the logs: KuaiSAR CC BY-NC-SA 4.0, Amazon research use"
PUBLISHED = {
    "amazon": KINDLE,
    "kuaisar": {name: counts for name, counts in KUAISAR.items() if "UniSAR" in name},
}
VOCAB = ("user_vocab.pkl", "src_session_vocab_np.pkl", "item_vocab_np.pkl")


def open_source(raw: Path, settings: PrepareSettings) -> Source:
    names = [f"dataset/{task}_{split}.pkl" for task in TASK_NAMES.values() for split in FILES.values()]
    files = tuple(raw / name for name in [*names, *(f"vocab/{name}" for name in VOCAB)])
    for path in files:
        if not path.is_file():
            raise DataError(
                f"{path}: no such file. RAW must be one of UniSAR's folders, Amazon or KuaiSAR, unpacked: "
                "with dataset/ and vocab/ in it."
            )
    return Source(
        name="unisar",
        files=files,
        read=lambda work: _read(work, raw, settings),
        license=LICENSE,
        published=PUBLISHED.get(raw.resolve().name.lower(), {**PUBLISHED["amazon"], **PUBLISHED["kuaisar"]}),
        has_stored_split=True,
    )


def _read(work: Work, raw: Path, settings: PrepareSettings) -> Tables:
    folder = work.folder / "unisar"
    folder.mkdir(exist_ok=True)
    facts = convert_apart(raw, folder)
    if settings.split == "stored" and facts["num_negatives"] != settings.num_negatives:
        raise DataError(
            f"{raw} stores {facts['num_negatives']} negatives for an event, and num_negatives is "
            f"{settings.num_negatives}. Use num_negatives={facts['num_negatives']}."
        )
    clicks, stored = (parquet_scan(folder / f"{name}.parquet") for name in ("clicks", "stored"))
    columns = "user_id, item_id, time, task, query"
    events = f"""
        SELECT *, true AS clicked, NULL::VARCHAR AS problem
        FROM (SELECT {columns} FROM {clicks} UNION SELECT {columns} FROM {stored})"""
    return Tables(
        events=events,
        items=ItemSql(parquet_scan(folder / "items.parquet"), text="''", words="words"),
        anonymised=True,
        notes=facts["notes"],
        stored=StoredSql(predictions=stored, lists=clicks, negatives=str(folder)),
    )


def convert_apart(raw: Path, out: Path) -> dict[str, Any]:
    """unisar_tables.convert in a process of its own, which sees no token of this one's environment."""
    root = Path(__file__).parents[2]
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "data_shards.sources.unisar_tables", str(raw.resolve()), str(out.resolve())],
        cwd=root,
        env={**kept, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode < 0:
        raise DataError(
            f"{raw}: the process that reads the pickled tables was ended by signal {-done.returncode}. "
            "Memory may be too small for them."
        )
    if done.returncode:
        raise RuntimeError(f"the reader of {raw} failed:\n{done.stderr}")
    facts: dict[str, Any] = json.loads(done.stdout)
    if "error" in facts:
        raise DataError(facts["error"])
    return facts
