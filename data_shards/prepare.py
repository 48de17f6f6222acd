"""The story of a preparation: raw logs → filter → split → histories → negatives → catalogue → shards → leak
checks → manifest."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from data_shards import encode, impressions, stored
from data_shards.append import Base, appended, open_base
from data_shards.catalog import name_ids, write_catalog
from data_shards.checks import check_prepared
from data_shards.errors import ConfigError, DataError, GensrError, write_fix
from data_shards.hashing import derive_seed, permutation
from data_shards.histories import in_histories, windows
from data_shards.negatives import KeySet, draw_negatives, user_item_keys
from data_shards.options import PrepareSettings, load_prepare_settings, settings_with_effect
from data_shards.progress import StageProgress, silent_stage
from data_shards.publish import finish_publishing, sync
from data_shards.schema import FORMAT_VERSION, SPLITS, TASKS, Manifest, read_manifest
from data_shards.settings import did_you_mean
from data_shards.sources import SOURCES, Source, open_source
from data_shards.sources.reading import no_room, readable, unreadable
from data_shards.split import (
    DAY_MS,
    HISTORY_ONLY,
    TEST,
    TRAIN,
    VALID,
    check_split,
    day_boundaries,
    describe_boundaries,
    iso,
    split_by_time,
    split_leave_one_out,
)
from data_shards.steps import removed_steps
from data_shards.work import BATCH_ROWS, Work, in_threads, user_chunks, write_text_atomic
from data_shards.write import EventColumns, describe_file, write_shards

PIPELINE_VERSION = 9  # change it when a stage writes something else: a restart then reuses nothing
SHUFFLE_SEED, NEGATIVE_SEED, HARD_SEED = 16, 17, 18
NEGATIVE_ROWS = 16_384  # events drawn for at once: x 99 x 8 B is about 13 MB an array
HISTORY_COLUMNS = {
    "history_start": "i8",
    "history_count": "i4",
    "history_item": "i4",
    "history_task": "i1",
    "history_query": "i4",
}
SHOWN_COLUMNS = {"shown_start": "i8", "shown_count": "i4"}
EVENT_COLUMNS = {**encode.EVENT_DTYPES, "split": "i1", **HISTORY_COLUMNS, **SHOWN_COLUMNS}


def prepare(
    source: str,
    raw: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    progress: StageProgress = silent_stage,
    append: str | Path = "",
) -> Manifest:
    """Raw logs of `source` (kuaisar, amazon, jdsearch, unisar, tables) in `raw` → the prepared folder `out`.
    overrides: "key=value" of PrepareSettings.

    append: a prepared folder that `raw` goes on from. `out` holds the clicks of both, its settings and its
    numbering (append.py).

    An interrupted call leaves `out` as it was; the same call again resumes after the last finished stage (in
    OUT.partial). Raises ConfigError for bad settings, DataError for input that cannot be used, or a disk or
    memory that is full.
    """
    if source not in SOURCES:
        hint = did_you_mean(source, SOURCES)
        raise ConfigError(f"{source}: no such source.{hint} Sources: {', '.join(SOURCES)}")
    raw, out = Path(raw), Path(out)
    base = open_base(Path(append), source, out) if append else None
    settings = base.settings(source, overrides) if base else load_prepare_settings(source, overrides)
    if not raw.exists():
        raise DataError(f"{raw}: no such file or folder. RAW holds the raw logs of source {source}.")
    target = out.resolve() if out.is_symlink() else out  # a link stays, and so does the disk it leads to
    finish_publishing(target)
    _check_out(out, settings.overwrite)
    reader = open_source(source, raw, settings, base.manifest.raw["text"]["mode"] if base else "")
    if base is not None:
        reader = appended(reader, base)
    _check_stored(settings, reader)
    if settings.split == "time" and not reader.has_clock:
        raise ConfigError(
            f"split=time: this {source} log has no common clock, only the order of each user's clicks. Use "
            "split=leave_one_out."
        )
    what = [PIPELINE_VERSION, source, settings_with_effect(settings), _describe_files(reader)]
    if base is not None:
        what.append(base.manifest.hash)
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    try:
        return _publish(target, key, reader, settings, base, progress)
    except (OSError, MemoryError, duckdb.Error) as error:  # numpy and pyarrow raise the second
        fix = write_fix(error, "Free space or memory")
        if isinstance(error, duckdb.OutOfMemoryException):  # of its share: the machine may have more
            fix = f"Set memory_limit above {settings.memory_limit}, use fewer threads, or free disk space"
        raise unreadable(error, reader.files) or DataError(
            f"writing {out.name} failed: {str(error).partition(chr(10))[0]}. {out} is as it was. {fix}, then "
            f"run the same command again: finished stages in {target}.partial are reused (or delete that "
            "folder)."
        ) from error


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise DataError(
            f"{out} exists already. Choose another folder, or add overwrite=true to replace it once the new "
            "one is complete."
        )
    if out.exists() and not (out / "manifest.json").is_file():
        raise DataError(f"{out} exists and is not a prepared folder: it stays. Choose another folder.")


def _publish(
    target: Path,
    key: str,
    reader: Source,
    settings: PrepareSettings,
    base: Base | None,
    progress: StageProgress,
) -> Manifest:
    """Every stage that an earlier attempt with the same key has not finished, then `target` in one move."""
    work = Work(target, key, settings.memory_limit, settings.threads, progress)
    try:
        _run(work, reader, settings, base)
        manifest = read_manifest(work.tree)  # what cannot be read must not replace what can
        work.publish(target)
    except GensrError:  # bad input or settings: nothing here is of use to another attempt
        work.discard()
        raise
    except duckdb.Error as error:
        if no_room(error):
            raise
        work.discard()
        raise readable(error, reader.files) from error
    finally:
        work.close()
    return manifest


def _run(work: Work, source: Source, settings: PrepareSettings, base: Base | None) -> None:
    read = work.stage("read", lambda: encode.read_rows(work, source))
    known = base.manifest.raw["counts"] if base else None
    codes = work.stage("encode", lambda: encode.encode_keys(work, settings, read["items"], known))
    clicks = work.stage("sort", lambda: encode.sort_clicks(work, read["counts"]["clicks"]))
    kept = work.stage("filter", lambda: encode.filter_clicks(work, settings, codes))
    if base is not None:
        base.check_kept(work)
    work.stage("names", lambda: name_ids(work, read))
    matched = (
        work.stage("stored", lambda: stored.match_rows(work, read["stored"]))
        if settings.split == "stored"
        else {}
    )
    split = work.stage("split", lambda: _split(work, settings, base is not None))
    work.stage("histories", lambda: _histories(work, settings, read["stored"]))
    work.stage("impressions", lambda: impressions.attach_shown(work, settings, kept["num_users"]))
    columns = _event_columns(work)
    catalog = work.stage("catalog", lambda: write_catalog(work, settings, columns, read, kept, base))
    work.close_database()
    if settings.split == "stored":
        work.stage("negatives", lambda: _stored_negatives(work, read["stored"]))
    else:
        work.stage("negatives", lambda: _negatives(work, columns, kept["num_items"], settings))
    widths, hard = {"negatives": settings.num_negatives}, {}
    if settings.hard_negatives:
        widths["hard_negatives"] = settings.hard_negatives
        hard = work.stage("hard negatives", lambda: _hard(work, columns, kept["num_items"], settings))
    shards = work.stage("shards", lambda: _shards(work, columns, settings))
    leak_checks = work.stage(
        "checks",
        lambda: check_prepared(work, columns, shards, kept["num_items"], widths, _as_stored(settings)),
    )
    manifest = _manifest(work, source, settings, read, clicks, kept, split, catalog, shards, leak_checks)
    manifest["removed"] = removed_steps(read, codes, kept, split)
    if repeated := matched.get("repeated", 0):
        manifest["dropped"]["stored row of a click that another row has"] = repeated
    if hard:
        manifest["hard_negatives"] = hard
    if base is not None:
        manifest["appended"] = base.lineage
        manifest["settings"]["tokenizer"] = base.manifest.raw["settings"].get("tokenizer", "")
    write_text_atomic(work.tree / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    for folder in (work.tree / "shards", work.tree / "catalog", work.tree):
        sync(folder)


def _check_stored(settings: PrepareSettings, source: Source) -> None:
    """Raises ConfigError for what does not go with stored splits."""
    if settings.split != "stored":
        if settings.history_rule == "count":
            raise ConfigError("history_rule=count needs split=stored: the counts are those of stored events.")
        return
    if not source.has_stored_split:
        raise ConfigError(
            f"split=stored: source {source.name} stores no splits. Use split=time or split=leave_one_out."
        )
    if settings.min_interactions or settings.both_behaviours:
        raise ConfigError(
            "split=stored keeps the events and candidates of the raw files as they are: use "
            "min_interactions=0 and both_behaviours=false, or another split."
        )


def _as_stored(settings: PrepareSettings) -> frozenset[str]:
    """Leak checks that look at what the raw files themselves hold."""
    if settings.split != "stored":
        return frozenset()
    return stored.AS_COUNTED if settings.history_rule == "count" else stored.AS_STORED


def _describe_files(source: Source) -> list[Any]:
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]


def _user_chunks(work: Work, stage: str) -> Iterator[tuple[int, int]]:
    user = work.column("user", "i4")
    for start, stop in user_chunks(user):
        yield start, stop
        work.progress(stage, stop, len(user))


def _split(work: Work, settings: PrepareSettings, appends: bool) -> dict[str, Any]:
    """Stage: column split. → rule, boundaries, counts of each split and task, fingerprint."""
    columns = work.columns(encode.EVENT_DTYPES)
    boundaries = (0, 0)
    if settings.split == "time":
        last = max(
            int(columns["time"][start : start + BATCH_ROWS].max())
            for start in range(0, len(columns["time"]), BATCH_ROWS)
        )
        boundaries = day_boundaries(last, settings.test_days, settings.valid_days, settings.utc_offset_hours)
    from_raw = stored.stored_split(work, len(columns["user"])) if settings.split == "stored" else None
    counts, digest = np.zeros((3, 2), np.int64), hashlib.sha256()

    def chunks() -> Iterator[dict[str, np.ndarray]]:
        for start, stop in _user_chunks(work, "split"):
            part = {name: np.asarray(values[start:stop]) for name, values in columns.items()}
            if from_raw is not None:
                split = from_raw[start:stop]
            elif settings.split == "time":
                split = split_by_time(part["time"], boundaries)
            else:
                split = split_leave_one_out(part["user"], part["time"])
            of_split = split != HISTORY_ONLY
            np.add.at(counts, (split[of_split], part["task"][of_split]), 1)
            for values in (*part.values(), split):
                digest.update(np.ascontiguousarray(values).data)
            yield {"split": split}

    work.write_columns(chunks(), {"split": "i1"})
    sizes = {name: int(counts[code].sum()) for code, name in enumerate(SPLITS)}
    hint = _outlier_hint(work, settings) if settings.split == "time" and not all(sizes.values()) else ""
    check_split(sizes, settings.split, hint, appends)
    return {
        "rule": settings.split,
        "boundaries": describe_boundaries(boundaries) if settings.split == "time" else {},
        "fingerprint": digest.hexdigest(),
        "counts": {
            name: {task: int(counts[code, i]) for i, task in enumerate(TASKS)}
            for code, name in enumerate(SPLITS)
        },
    }


def _outlier_hint(work: Work, settings: PrepareSettings) -> str:
    """The last two days of the log and how few clicks they have: one wrong date moves the whole split."""
    offset = settings.utc_offset_hours * 3_600_000
    days, clicks = np.unique((work.column("time", "i8") + offset) // DAY_MS, return_counts=True)
    shown = [
        f"{iso(int(day) * DAY_MS)[:10]} ({count:,} of {clicks.sum():,} clicks)"
        for day, count in zip(days, clicks, strict=True)
    ]
    before = f", the one before it {shown[-2]}" if len(shown) > 1 else ""
    return f"The last day of the log is {shown[-1]}{before}"


def _histories(work: Work, settings: PrepareSettings, raw_lists: dict[str, str] | None) -> None:
    """Stage: columns history_start, history_count of each event and the flat history_item, history_task,
    history_query. raw_lists: sources.StoredSql, for history_rule=count."""
    columns = work.columns(encode.EVENT_DTYPES)
    written = 0

    def ranges() -> Iterator[dict[str, np.ndarray]]:
        nonlocal written
        for start, stop in _user_chunks(work, "histories"):
            user, time, item, task, query = (
                np.asarray(columns[name][start:stop]) for name in ("user", "time", "item", "task", "query")
            )
            keep = in_histories(user, time, item, task)
            first, count = windows(user, time, keep, settings.history_max)
            flat = {
                "history_item": item[keep],
                "history_task": task[keep],
                "history_query": query[keep],
                "history_row": start + np.flatnonzero(keep),
            }
            yield {"history_start": first + written, "history_count": count, **flat}
            written += int(keep.sum())

    parts = ranges()
    if settings.history_rule == "count" and raw_lists is not None:
        parts = stored.counted_histories(work, raw_lists, settings.history_max)
    work.write_columns(parts, {**HISTORY_COLUMNS, "history_row": "i8"})


def _event_columns(work: Work) -> EventColumns:
    return EventColumns(**work.columns(EVENT_COLUMNS), shown_item=work.column("shown_chosen", "i4"))


def _negatives(work: Work, columns: EventColumns, num_items: int, settings: PrepareSettings) -> None:
    """Stage: columns negatives_valid and negatives_test, num_negatives items for each event of the split, in
    event order."""
    seed = derive_seed(settings.seed, NEGATIVE_SEED)
    width = settings.num_negatives

    def chunks(code: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, stop in _user_chunks(work, "negatives"):
            rows = np.flatnonzero(columns.split[start:stop] == code) + start
            taken = user_item_keys(columns.user[start:stop], columns.item[start:stop], num_items)
            for at in range(0, len(rows), NEGATIVE_ROWS):
                yield rows[at : at + NEGATIVE_ROWS], taken

    def draw(part: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        rows, taken = part
        return draw_negatives(rows, columns.user[rows], taken, num_items, width, seed).reshape(-1)

    for name, code in (("valid", VALID), ("test", TEST)):
        drawn = in_threads(draw, chunks(code), settings.threads)
        work.write_columns(({f"negatives_{name}": part} for part in drawn), {f"negatives_{name}": "i4"})


def _stored_negatives(work: Work, raw: dict[str, str]) -> None:
    """Stage: the same columns, as the raw files have them."""
    keys = np.concatenate(
        [batch.column(0).to_numpy() for batch in work.batches("SELECT key FROM final_items ORDER BY id")]
    )
    for name, code in (("valid", VALID), ("test", TEST)):
        parts = stored.stored_negatives(work, raw, keys, name, code)
        column = f"negatives_{name}"
        work.write_columns(({column: part.reshape(-1)} for part in parts), {column: "i4"})
    work.close_database()


def _hard(work: Work, columns: EventColumns, num_items: int, settings: PrepareSettings) -> dict[str, Any]:
    """Stage: columns hard_valid and hard_test, hard_negatives items for each event of the split, in event
    order. → rules, seed, and how many were mined (the others are uniform)."""
    from data_shards.hard_negatives import RULES, Miner, fill

    seed, width = derive_seed(settings.seed, HARD_SEED), settings.hard_negatives
    miner = Miner(columns, work.tree / "catalog", num_items, width)
    counts = {name: dict.fromkeys(TASKS, 0) for name in ("valid", "test")}

    def parts(name: str, code: int) -> Iterator[dict[str, np.ndarray]]:
        for start, stop in _user_chunks(work, "hard negatives"):
            every = np.flatnonzero(columns.split[start:stop] == code) + start
            taken = user_item_keys(columns.user[start:stop], columns.item[start:stop], num_items)
            clicked = KeySet(taken)
            for at in range(0, len(every), NEGATIVE_ROWS):
                rows = every[at : at + NEGATIVE_ROWS]
                mined = np.full((len(rows), width), -1, np.int32)
                for number, task in enumerate(TASKS):
                    mine = np.flatnonzero(columns.task[rows] == number)
                    mined[mine] = miner.mine(rows[mine], number, clicked)
                    counts[name][task] += int((mined[mine] >= 0).sum())
                uniform = draw_negatives(
                    rows, columns.user[rows], taken, num_items, width, seed, setting="hard_negatives"
                )
                yield {f"hard_{name}": fill(mined, uniform).reshape(-1)}

    for name, code in (("valid", VALID), ("test", TEST)):
        work.write_columns(parts(name, code), {f"hard_{name}": "i4"})
    return {"seed": seed, "rules": RULES, "mined": counts}


def _shards(work: Work, columns: EventColumns, settings: PrepareSettings) -> dict[str, Any]:
    """Stage: shards/ of the tree; training events in a hashed order, validation and test events in event
    order."""

    def write(name: str, code: int) -> list[dict[str, Any]]:
        event_ids, negatives, hard = np.flatnonzero(columns.split == code), None, None
        if code == TRAIN:
            event_ids = event_ids[permutation(len(event_ids), derive_seed(settings.seed, SHUFFLE_SEED))]
        else:
            negatives = work.column(f"negatives_{name}", "i4").reshape(-1, settings.num_negatives)
            if settings.hard_negatives:
                hard = work.column(f"hard_{name}", "i4").reshape(-1, settings.hard_negatives)
        return write_shards(
            work.tree,
            name,
            event_ids,
            columns,
            negatives,
            settings.block_events,
            settings.shard_events,
            settings.compression,
            settings.threads,
            lambda done: work.progress(f"shards {name}", done, len(event_ids)),
            hard,
        )

    return {name: write(name, code) for name, code in zip(SPLITS, (TRAIN, VALID, TEST), strict=True)}


def _manifest(
    work: Work,
    source: Source,
    settings: PrepareSettings,
    read: dict[str, Any],
    clicks: dict[str, Any],
    kept: dict[str, Any],
    split: dict[str, Any],
    catalog: dict[str, Any],
    shards: dict[str, Any],
    leak_checks: dict[str, Any],
) -> dict[str, Any]:
    """manifest.json: nothing in it depends on when, where or with how many threads it was made."""
    dropped = {
        **read["dropped"],
        "duplicate click": clicks["num_duplicates"],
        "filtered click": kept["dropped_clicks"],
        "repeated item row": catalog["repeated_items"],
    }
    files = sorted(path for folder in ("catalog", "tokenizer") for path in (work.tree / folder).iterdir())
    raw = read["counts"]
    with_effect = settings_with_effect(settings)
    with_effect["tokenizer"] = os.path.basename(settings.tokenizer.rstrip("/"))
    return {
        "format_version": FORMAT_VERSION,
        "gensr_version": _version(),
        "source": {
            "name": source.name,
            "files": [{"name": p.name, "num_bytes": p.stat().st_size} for p in source.files],
            "license": source.license,
            **read["notes"],
        },
        "settings": with_effect,
        "counts": {
            "users": kept["num_users"],
            "items": kept["num_items"],
            "queries": kept["num_queries"],
            **catalog["categories"],
            **split["counts"],
            "raw": {name: raw[name] for name in ("users", "items", "queries", "rec", "src")},
        },
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "published": source.published,
        "split": {key: split[key] for key in ("rule", "boundaries", "fingerprint")},
        "seeds": {"seed": settings.seed},
        "text": catalog["text"],
        "shards": shards,
        "catalog": [describe_file(work.tree, path) for path in files],
        "leak_checks": leak_checks,
    }


def _version() -> str:
    try:
        return importlib.metadata.version("gensr")
    except importlib.metadata.PackageNotFoundError:  # used from a checkout that is not installed
        return "0"


__all__ = ["Manifest", "PrepareSettings", "prepare"]
