"""The work folder OUT.partial: finished stages survive an interruption, the result appears under its name
only when complete."""

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import numpy as np
import pyarrow as pa

from data_shards.address_space import check_address_space
from data_shards.errors import DataError
from data_shards.progress import StageProgress
from data_shards.publish import LOCK, STAGES, TREE, clear, partial_folder, publish, recover, take_lock
from data_shards.sql import literal

Part = TypeVar("Part")
Result = TypeVar("Result")
# rows handled at once: bounds the memory of every numpy step, and gives each thread its share
BATCH_ROWS = 250_000


class Work:
    """One preparation in progress. `stage` runs a step once per key; a restart with the same key skips
    finished steps."""

    def __init__(self, out: Path, key: str, memory_limit: str, threads: int, progress: StageProgress) -> None:
        self.folder = partial_folder(out)
        self.columns_folder = self.folder / "columns"
        self.tree = self.folder / TREE  # becomes OUT
        self.progress = progress
        self.memory_limit, self.threads = memory_limit, threads
        self._con: duckdb.DuckDBPyConnection | None = None
        if "?" in str(self.folder):
            raise DataError(f"{out}: duckdb cannot write to a path with a question mark. Choose another OUT.")
        self._lock = take_lock(self.folder)
        recover(self.folder, out)
        self._stages = self._read_stages(key)
        self.columns_folder.mkdir(exist_ok=True)

    def _read_stages(self, key: str) -> dict[str, Any]:
        path = self.folder / STAGES
        try:
            stages = json.loads(path.read_text())
        except (FileNotFoundError, ValueError, RecursionError):
            stages = {}
        if isinstance(stages, dict) and stages.get("key") == key:
            return stages
        clear(self.folder)  # left by other input or settings: of no use
        return {"key": key, "done": {}}

    @property
    def con(self) -> duckdb.DuckDBPyConnection:
        """The work database, opened on first use."""
        if self._con is None:
            check_address_space(self.memory_limit)
            at_once = {  # before its threads start: one a core otherwise, each with a stack
                "threads": self.threads,
                "memory_limit": self.memory_limit,
                "preserve_insertion_order": False,
            }
            con = duckdb.connect(str(self.folder / "work.duckdb"), config=at_once)
            con.execute(f"SET temp_directory={literal(self.folder / 'spill')}")
            con.execute("SET TimeZone='UTC'")  # a time means the same on every machine
            con.execute("SET enable_progress_bar=true; SET enable_progress_bar_print=false")
            self._con = con
        return self._con

    def close_database(self) -> None:
        """Give duckdb's memory back before numpy needs it."""
        if self._con is not None:
            self._con.close()
            self._con = None

    def stage(self, name: str, run: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """The result of `run` (a JSON object, {} for none), from the last attempt if that one finished this
        stage. Raises KeyboardInterrupt also where Ctrl-C meets a query."""
        if name not in self._stages["done"]:
            self.progress(name, 0, 0)
            try:
                result = run() or {}
            except RuntimeError as error:
                if str(error) == "Query interrupted":  # duckdb's own word for it
                    raise KeyboardInterrupt from error
                raise
            if self._con is not None:
                self._con.execute("CHECKPOINT")
            self._stages["done"][name] = json.loads(json.dumps(result))
            write_text_atomic(self.folder / STAGES, json.dumps(self._stages))
        return self._stages["done"][name]

    def execute(self, sql: str, stage: str = "", rows: int = 0) -> None:
        """Run one SQL statement; while it runs, report duckdb's own progress under `stage`, as a share of
        about `rows` rows."""
        con, finished = self.con, threading.Event()

        def watch() -> None:
            while not finished.wait(0.5):
                percent = con.query_progress()
                if percent > 0:
                    self.progress(stage, int(percent / 100 * rows), rows)

        watcher = threading.Thread(target=watch, daemon=True)
        if stage:
            watcher.start()
        try:
            con.execute(sql)
        finally:
            finished.set()
            if stage:
                watcher.join()

    def scalar(self, sql: str) -> Any:
        return self.con.execute(sql).fetchall()[0][0]

    def in_file_order(self) -> None:
        """Queries number rows in the order of their file from now on, slowly: for errors that name a row."""
        self.con.execute("SET threads=1; SET preserve_insertion_order=true")

    def first_row(self, scan: str, condition: str, shown: str) -> tuple[int, Any] | None:
        """Of the first row of a file's scan that meets an SQL condition: its number, from 1, and the value of
        an expression; None when no row does."""
        self.in_file_order()
        numbered = f"SELECT row_number() OVER () AS row, {shown} AS shown, {condition} AS met FROM {scan}"
        first = f"SELECT row, shown FROM ({numbered}) WHERE met ORDER BY row LIMIT 1"
        found: list[tuple[int, Any]] = self.con.execute(first).fetchall()
        self.con.execute(f"SET threads={self.threads}; SET preserve_insertion_order=false")
        return found[0] if found else None

    def batches(self, sql: str, rows: int = 131_072) -> Iterator[pa.RecordBatch]:
        """The rows of a query as Arrow batches (a whole result never lies in memory)."""
        relation = self.con.sql(sql)
        reader = (
            relation.to_arrow_reader(rows)
            if hasattr(relation, "to_arrow_reader")
            else relation.fetch_arrow_reader(rows)
        )
        yield from reader

    def put_table(self, name: str, table: pa.Table) -> None:
        self.con.register("incoming", table)
        self.con.execute(f"CREATE OR REPLACE TABLE {name} AS SELECT * FROM incoming")
        self.con.unregister("incoming")

    def write_columns(
        self, parts: Iterable[dict[str, np.ndarray]], dtypes: dict[str, str], prefix: str = ""
    ) -> int:
        """Append chunk after chunk to one flat file per column (columns may differ in length); returns the
        number of rows of the first. prefix: the files' names begin with it, those in `parts` do not."""
        files = {
            name: open(self._column_path(prefix + name, dtype), "wb")  # noqa: SIM115
            for name, dtype in dtypes.items()
        }
        num_rows = 0
        try:
            for part in parts:
                for name, dtype in dtypes.items():
                    files[name].write(np.ascontiguousarray(part[name], dtype=dtype).data)
                num_rows += len(part[next(iter(dtypes))])
        finally:
            for file in files.values():
                file.close()
        return num_rows

    def column(self, name: str, dtype: str) -> np.ndarray:
        """A memory-mapped column, read-only."""
        path = self._column_path(name, dtype)
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # the plain type indexes faster

    def columns(self, dtypes: dict[str, str], prefix: str = "") -> dict[str, np.ndarray]:
        """Those that write_columns() has written with these arguments."""
        return {name: self.column(prefix + name, dtype) for name, dtype in dtypes.items()}

    def _column_path(self, name: str, dtype: str) -> Path:
        return self.columns_folder / f"{name}.{np.dtype(dtype).str[1:]}"

    def publish(self, out: Path) -> None:
        """Give the finished tree its name, also where a folder has it already; remove the work folder."""
        self.close_database()
        publish(self.folder, out)
        self.discard()

    def discard(self) -> None:
        """Remove the work folder: its lock last, and only then let go of it."""
        self.close_database()
        with contextlib.suppress(OSError):
            clear(self.folder)
            (self.folder / LOCK).unlink()
            self.folder.rmdir()
        self.close()

    def close(self) -> None:
        self.close_database()
        self._lock.close()


def in_threads(run: Callable[[Part], Result], parts: Iterable[Part], threads: int) -> Iterator[Result]:
    """run(part) of each part, in order; `threads` parts at once (numpy, pyarrow and hashing let other threads
    work), none held back beyond that."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Result]] = deque()
        try:
            for part in parts:
                running.append(pool.submit(run, part))
                if len(running) == threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def user_chunks(user: np.ndarray, rows: int = BATCH_ROWS) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) of about `rows` rows of a sorted column of users; none cuts the rows of one."""
    start = 0
    while start < len(user):
        last = user[min(start + rows, len(user)) - 1]
        stop = int(np.searchsorted(user, last, side="right"))
        yield start, stop
        start = stop


def write_text_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
