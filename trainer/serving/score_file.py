"""Batch scoring: a file of requests in, the same rows with their answers out, in bounded memory and in parts
that jobs can share.

REQUESTS  .jsonl (an object a line) or .parquet (a row a request: history list<struct<item_id, task>>, task,
          query, candidates list, …; serving/recommend.py)
OUT       .jsonl, and standard output: {"scores": […], "items": […]} a line
          .parquet: the columns of REQUESTS, scores list<double>, items list<struct<item_id, score>>, error
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.errors import RequestError, RunError
from trainer.runtime.files import atomic
from trainer.runtime.progress import CountProgress
from trainer.serving.recommend import Recommender

CHUNK = 256  # requests answered at once
RESULTS = pa.schema(
    [
        ("scores", pa.list_(pa.float64())),
        ("items", pa.list_(pa.struct([("item_id", pa.string()), ("score", pa.float64())]))),
        ("error", pa.string()),
    ]
)
Answered = tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]  # requests, answers


def score_file(
    recommender: Recommender,
    requests: Path,
    out: Path,
    part: tuple[int, int] = (1, 1),
    keep_going: bool = False,
    progress: CountProgress | None = None,
) -> int:
    """Answer the requests of part i of n (by position in the file) into `out`, which appears when it is
    whole. → how many were answered.

    Raises RequestError that names the rows of a bad request; keep_going: its error stands in its place
    instead. RunError when `out` exists.
    """
    if out.exists():
        raise RunError(f"{out} exists: it is not overwritten. Move it away, or name another file.")
    if out.suffix not in (".jsonl", ".parquet") or (
        out.suffix == ".parquet" and requests.suffix != ".parquet"
    ):
        raise RequestError(
            f"{out}: answers to {requests.suffix or 'such'} requests go to "
            f".jsonl{' or .parquet' if requests.suffix == '.parquet' else ''}"
        )
    first, last = part_of(count_requests(requests), part)
    if out.suffix == ".parquet":
        _check_columns(requests)
    answered = _answered(recommender, requests, (first, last), keep_going, progress)
    with atomic(out) as temporary:
        if out.suffix == ".parquet":
            _write_parquet(temporary, answered, pq.read_schema(requests))
        else:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in _lines_of(answered))
    return last - first


def answer_lines(
    recommender: Recommender, requests: Path, part: tuple[int, int] = (1, 1), keep_going: bool = False
) -> Iterator[str]:
    """The lines that score_file() would write into a .jsonl, one after the other."""
    positions = part_of(count_requests(requests), part)
    return _lines_of(_answered(recommender, requests, positions, keep_going))


def _lines_of(answered: Iterable[Answered]) -> Iterator[str]:
    for _, answers in answered:
        yield from (json.dumps(answer, ensure_ascii=False) for answer in answers)


def _check_columns(requests: Path) -> None:
    taken = [name for name in RESULTS.names if name in pq.read_schema(requests).names]
    if taken:
        raise RequestError(
            f"{requests}: its columns {', '.join(taken)} are those of the answers: rename them, or write "
            ".jsonl"
        )


def part_of(count: int, part: tuple[int, int]) -> tuple[int, int]:
    """Positions [first, last) of part i of n, i from 1."""
    number, of = part
    if not 1 <= number <= of:
        raise RequestError(f"part {number}/{of}: must be I/N with 1 ≤ I ≤ N")
    return count * (number - 1) // of, count * number // of


def count_requests(path: Path) -> int:
    """How many requests a file holds. Raises RequestError when there is none, or it cannot be read."""
    if path.is_fifo():
        raise RequestError(f"{path} is a pipe, and requests are read twice: write them into a file first")
    count = _parquet(path).metadata.num_rows if path.suffix == ".parquet" else sum(1 for _ in _lines(path))
    if count == 0:
        raise RequestError(f"{path} holds no request: one JSON object a line, or one row of parquet")
    return count


def read_requests(path: Path) -> Iterator[dict[str, Any]]:
    """The requests of a file, in order. Raises RequestError naming the line of a bad one."""
    if path.suffix == ".parquet":
        batches = _parquet(path).iter_batches(CHUNK)
        while (batch := _next_batch(path, batches)) is not None:
            yield from batch.to_pylist()
        return
    for number, line in _lines(path):
        yield _request(path, number, line)


def _requests_or_errors(path: Path) -> Iterator[dict[str, Any] | RequestError]:
    """The same, with the error of a bad line in its place."""
    if path.suffix == ".parquet":
        yield from read_requests(path)
        return
    for number, line in _lines(path):
        try:
            yield _request(path, number, line)
        except RequestError as error:
            yield error


def _request(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError, MemoryError) as error:
        raise RequestError(f"{path}, line {number}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise RequestError(
            f'{path}, line {number}: a request is an object with "history", "task" and "candidates"'
        )
    return record


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, numbered from 1."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from error


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from error


def _next_batch(path: Path, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (OSError, pa.ArrowInvalid) as error:
        raise RequestError(f"{path}: cannot be read: {error}") from error


def _answered(
    recommender: Recommender,
    path: Path,
    positions: tuple[int, int],
    keep_going: bool,
    progress: CountProgress | None = None,
) -> Iterator[Answered]:
    first, last = positions
    rows = itertools.islice(_requests_or_errors(path) if keep_going else read_requests(path), first, last)
    done = 0
    while chunk := list(itertools.islice(rows, CHUNK)):
        requests = [row if isinstance(row, dict) else {} for row in chunk]
        if keep_going:
            good = iter(recommender.answer_or_errors([row for row in chunk if isinstance(row, dict)]))
            answers = [_or_error(next(good) if isinstance(row, dict) else row) for row in chunk]
        else:
            try:
                answers = recommender.answer(requests)
            except RequestError as error:
                raise RequestError(
                    f"{path}, rows {first + done + 1} to {first + done + len(chunk)}: {error}"
                ) from error
        done += len(chunk)
        if progress is not None:
            progress(done, last - first)
        yield requests, answers


def _or_error(answer: dict[str, Any] | RequestError) -> dict[str, Any]:
    if isinstance(answer, RequestError):
        return {"scores": None, "items": None, "error": str(answer)}
    return answer


def _write_parquet(path: Path, answered: Iterable[Answered], columns: pa.Schema) -> None:
    schema = pa.unify_schemas([columns, RESULTS])
    with pq.ParquetWriter(path, schema) as writer:
        for requests, answers in answered:
            rows = [{**request, **_row(answer)} for request, answer in zip(requests, answers, strict=True)]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _row(answer: dict[str, Any]) -> dict[str, Any]:
    items = answer["items"]
    named = (
        None
        if items is None
        else [{"item_id": str(item["item_id"]), "score": item["score"]} for item in items]
    )
    return {"scores": answer["scores"], "items": named, "error": answer.get("error")}
