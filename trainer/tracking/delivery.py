"""Records on their way to MLflow: a file that training appends to, and a thread that sends what is in it.
Nobody waits for a store.

    log_metrics         ─▶ RUN/tracking-spool.jsonl ─┬▶ Sender (a thread) ─▶ store
    tracking/machine.py ─▶ RUN/machine/NODE.jsonl   ─┘

While a store is down or slow the files grow; they are sent when it answers again, by this process or a later
one.

A record is written before it is sent, so a killed process loses none; what was sent twice is stored once (a
metric's step counts).
"""

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_shards.secrets import mask_secrets
from trainer.runs.run_folder import RunFolder
from trainer.tracking.store import chunks, connect, dataset_input, is_server, one_line

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Record = Mapping[str, Any]
RETRY_EVERY_S = 30.0
RETRY_AT_THE_END_S = 2.0  # in close()
LOOK_EVERY_S = 10.0  # at what other nodes have written
MAX_METRICS, MAX_TAGS = 1000, 100  # entries of one request, MLflow's limits
MAX_BYTES = 4_000_000  # of the spool, read at once
METRIC_NAME = re.compile(r"[/\w.\- :]{1,250}")  # MLflow's rule
# Answers of a store to what it will never take: the record is left out, and the others go on.
HOPELESS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")

log = logging.getLogger(__name__)


class JsonLines:
    """The complete lines of a growing file, each once. What is no JSON object (of a killed process, of a
    damaged file) or longer than MAX_BYTES is passed over and counted in `num_skipped`, once."""

    def __init__(self, path: Path) -> None:
        self.path, self.position, self.num_skipped = path, 0, 0
        self._counted_to = 0  # a part that could not be sent is read again

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """(records after `position`, the position after them)."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                content = file.read(MAX_BYTES)
                if len(content) == MAX_BYTES and b"\n" not in content:
                    return [], self._after_long_line(file)
        except OSError:
            return [], self.position
        end = content.rfind(b"\n") + 1
        records, skipped = [], 0
        for line in content[:end].splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                skipped += bool(line.strip())
        self._count(skipped, self.position + end)
        return records, self.position + end

    def _count(self, skipped: int, end: int) -> None:
        if end > self._counted_to:
            self.num_skipped, self._counted_to = self.num_skipped + skipped, end

    def _after_long_line(self, file: BinaryIO) -> int:
        """The position after a line that is too long; the old one while the line is not complete."""
        while content := file.read(MAX_BYTES):
            if (found := content.find(b"\n")) >= 0:
                end = file.tell() - len(content) + found + 1
                self._count(1, end)
                return end
        return self.position


class Spool(JsonLines):
    """Records that wait. Threads append and send at the same time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._lock = threading.Lock()
        self.end_line()

    def end_line(self) -> None:
        """After a process that was killed while it wrote."""
        if self.path.is_file() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            self.append([], "\n")

    def append(self, records: Sequence[Record], text: str = "") -> None:
        """Raises OSError where the disk does not take it."""
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(text + "".join(json.dumps(record) + "\n" for record in records))

    def sent(self, position: int) -> None:
        """Everything before `position` has arrived; a file without anything else is removed."""
        with self._lock:
            self.position = position
            if self.path.is_file() and self.path.stat().st_size == position:
                self.path.unlink()
                self.position = self._counted_to = 0

    def is_empty(self) -> bool:
        return not self.path.is_file() or self.path.stat().st_size == self.position


class Sender(threading.Thread):
    """Sends a run's records until close(). `open_run` returns the run's id; it is tried until it does."""

    def __init__(
        self, uri: str, run_dir: Path, open_run: Callable[["MlflowClient"], str], resumed: bool
    ) -> None:
        super().__init__(name="tracking", daemon=True)
        self.uri, self.run_id = uri, ""
        self.refused: Exception | None = None  # why the run cannot be opened, ever
        self.unattended = False  # nobody waits for `opened` any more: a refusal must be said by this thread
        self.num_left_out = 0  # records that no store takes
        self.opened = threading.Event()  # or refused
        self._open_run, self._run_dir = open_run, run_dir
        self.spool = Spool(RunFolder(run_dir).spool)
        self._machines: dict[Path, JsonLines] = {}
        self._last_step: dict[str, int] | None = None if resumed else {}
        self._news, self._closing, self._warned = threading.Event(), threading.Event(), False
        self._close_by_s, self._said_left_out = 0.0, False

    def put(self, records: Sequence[Record]) -> None:
        """Returns at once. A disk that does not take it costs the records and a warning, not the training."""
        try:
            self.spool.append(records)
        except OSError as error:
            self._warn(error)
        self._news.set()

    def close(self, timeout_s: float) -> bool:
        """Send what is left, for `timeout_s` at most, again and again while a server is down; True when
        everything has arrived."""
        self._close_by_s = time.monotonic() + timeout_s
        self._closing.set()
        self._news.set()
        self.join(timeout_s)
        return not self.is_alive() and self.spool.is_empty()

    def run(self) -> None:
        client: MlflowClient | None = None
        while True:
            closing = self._closing.is_set()
            self._news.clear()
            try:
                client = client or connect(self.uri)
                self._deliver(client)
                if closing:
                    return
                self._news.wait(LOOK_EVERY_S)
            except Exception as error:
                if not self.opened.is_set() and not is_outage(error, self.uri):
                    self.refused = error
                    self.opened.set()
                    if self.unattended:
                        self._warn(error)
                    return
                self._warn(error)
                if not closing:
                    self._closing.wait(RETRY_EVERY_S)
                elif is_outage(error, self.uri) and time.monotonic() + RETRY_AT_THE_END_S < self._close_by_s:
                    time.sleep(RETRY_AT_THE_END_S)
                else:
                    return

    def _deliver(self, client: "MlflowClient") -> None:
        """Everything that is there now. Raises whatever the store does; what has arrived by then is not sent
        again."""
        if not self.opened.is_set():
            self.run_id = self._open_run(client)
            self.opened.set()
        while True:
            records, position = self.spool.read()
            if position == self.spool.position:
                break
            self._send(client, records)
            self.spool.sent(position)
            self._say_left_out()
        for path in sorted(RunFolder(self._run_dir).machine.glob("*.jsonl")):
            lines = self._machines.setdefault(path, JsonLines(path))
            samples, position = lines.read()
            self._send(client, [point for sample in samples for point in machine_points(path.stem, sample)])
            lines.position = position
            self._say_left_out()

    def _send(self, client: "MlflowClient", records: Sequence[Record]) -> None:
        # after a resume the steps since the checkpoint are run, and reported, again
        if self._last_step is None:
            self._last_step = logged_steps(client, self.run_id)
        fresh = []
        last = dict(self._last_step)
        for record in records:
            if is_point(record):
                key, _, _, step = record["metric"]
                if step <= last.get(key, -1):
                    continue
                last[key] = step
            fresh.append(record)
        self.num_left_out += send(client, self.run_id, fresh)
        self._last_step = last
        if self._warned and fresh:
            log.warning("MLflow at %s answers again", mask_secrets(self.uri))
            self._warned = False

    @property
    def num_lost(self) -> int:
        """Records and lines that were passed over so far."""
        files = (self.spool, *self._machines.values())
        return self.num_left_out + sum(lines.num_skipped for lines in files)

    def _say_left_out(self) -> None:
        if self.num_lost and not self._said_left_out:
            log.warning("%s: what MLflow cannot take is left out, the rest is sent", self.spool.path)
            self._said_left_out = True

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            uri, spool = mask_secrets(self.uri), self.spool.path
            log.warning(
                "MLflow at %s failed (%s). Training continues; points are kept in %s",
                uri,
                one_line(error),
                spool,
            )
        self._warned = True


def machine_points(node: str, sample: Record) -> list[Record]:
    """A line of RUN/machine/NODE.jsonl as metrics `system/NODE/…`, which MLflow shows on their own page."""
    values = sample.get("values")
    return [
        {"metric": [f"system/{node}/{name}", value, sample.get("time_ms"), sample.get("step")]}
        for name, value in (values.items() if isinstance(values, dict) else ())
    ]


def is_point(record: Record) -> bool:
    """Whether a record is a metric that can be compared and sent: [name, value, time in ms, step]."""
    metric = record.get("metric")
    if not isinstance(metric, list) or len(metric) != 4:
        return False
    name, value, time_ms, step = metric
    whole = all(type(number) is int and abs(number) < 2**63 for number in (time_ms, step))
    named = isinstance(name, str) and METRIC_NAME.fullmatch(name) is not None
    return whole and named and isinstance(value, int | float) and not isinstance(value, bool)


def logged_steps(client: "MlflowClient", run_id: str) -> dict[str, int]:
    """The last step of each metric that the store has."""
    return {
        key: max(point.step for point in client.get_metric_history(run_id, key))
        for key in client.get_run(run_id).data.metrics
    }


def send(client: "MlflowClient", run_id: str, records: Sequence[Record]) -> int:
    """Records → the store, metrics in large requests; returns how many were left out because no store takes
    them. Sending them again changes nothing. Raises what the store does, but for hopeless records."""
    from mlflow.entities import Metric

    points = [Metric(*record["metric"]) for record in records if is_point(record)]
    left_out = sum("metric" in record for record in records) - len(points)
    for chunk in chunks(points, MAX_METRICS):
        left_out += _send_points(client, run_id, chunk)
    for record in records:
        if "metric" in record:
            continue
        try:
            _send_one(client, run_id, record)
        except Exception as error:
            if not is_hopeless(error):
                raise
            left_out += 1
            log.warning(
                "MLflow does not take %s of run %s (%s)", next(iter(record), ""), run_id, one_line(error)
            )
    return left_out


def _send_points(client: "MlflowClient", run_id: str, points: Sequence[Any]) -> int:
    """One request, and after a refusal halves of it, down to the points that are refused; → how many."""
    try:
        client.log_batch(run_id, metrics=points)
    except Exception as error:
        if not is_hopeless(error):
            raise
        if len(points) == 1:
            return 1
        half = len(points) // 2
        return sum(_send_points(client, run_id, part) for part in (points[:half], points[half:]))
    return 0


def _send_one(client: "MlflowClient", run_id: str, record: Record) -> None:
    from mlflow.entities import Param, RunTag

    if "params" in record:
        for chunk in chunks([Param(key, value) for key, value in record["params"].items()], MAX_TAGS):
            client.log_batch(run_id, params=chunk)
    elif "tags" in record:
        for chunk in chunks([RunTag(key, value) for key, value in record["tags"].items()], MAX_TAGS):
            client.log_batch(run_id, tags=chunk)
    elif "dataset" in record:
        client.log_inputs(run_id, datasets=[dataset_input(record["dataset"])])
    elif "text" in record:
        client.log_text(run_id, record["text"], record["file"])
    elif "artifact" in record:
        client.log_artifact(run_id, record["artifact"], record["folder"] or None)
    elif record.get("status") == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    elif "status" in record:
        client.set_terminated(run_id, record["status"], record["end_ms"])


def is_hopeless(error: Exception) -> bool:
    """What no later attempt could send either: a file that is gone, a record that is not made as it should
    be."""
    of_the_record = isinstance(error, FileNotFoundError | AttributeError | KeyError | TypeError)
    return of_the_record or getattr(error, "error_code", "") in HOPELESS


def is_outage(error: Exception, uri: str) -> bool:
    """A store that may answer later: a server, or a database that another program has locked. What the user
    must mend (a wrong address or token, a local file that cannot be opened) is none."""
    if not is_server(uri):
        return bool(re.search(r"database( table)? is locked", str(error)))
    code = re.search(r"failed with error code (\d+)", str(error))
    status = int(code[1]) if code else _http_status(error)
    return not 400 <= status < 500 or status in (408, 429)


def _http_status(error: Exception) -> int:
    return (
        int(error.get_http_status_code())
        if hasattr(error, "get_http_status_code") and hasattr(error, "json")
        else 503
    )
