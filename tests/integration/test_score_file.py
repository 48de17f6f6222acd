"""Batch scoring: parts add up to the whole, answers are those of single requests, a bad row is named or kept,
nothing is overwritten."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.runs import make_run
from trainer.cli import app as cli
from trainer.errors import RequestError, RunError
from trainer.serving import score_file as module
from trainer.serving.recommend import Recommender
from trainer.serving.score_file import count_requests, part_of, read_requests, score_file

NUM_REQUESTS = 23
BAD = {"task": "rec", "history": [], "candidates": ["nothing"]}


@pytest.fixture(scope="module")
def recommender(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    return Recommender.from_run(make_run(tmp_path_factory.mktemp("scores"), prepared))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)


def requests() -> list[dict[str, Any]]:
    """Candidates of different numbers; every third is a search of the whole catalogue."""
    rows = []
    for number in range(NUM_REQUESTS):
        history = [{"item_id": f"i{number % 7}", "task": "rec"}]
        candidates = [f"i{(number + step) % 20}" for step in range(1 + number % 4)]
        search = {"task": "src", "query": "red lamp", "candidates": None}
        rows.append(
            {
                "id": number,
                "history": history,
                "task": "rec",
                "query": None,
                "candidates": candidates,
                **(search if number % 3 == 2 else {}),
            }
        )
    return rows


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_parts_add_up_to_what_single_requests_get(recommender: Recommender, tmp_path: Path) -> None:
    source = parquet(tmp_path / "requests.parquet", requests())
    rows: list[dict[str, Any]] = []
    for number in (1, 2, 3):
        out = tmp_path / f"part-{number}.parquet"
        score_file(recommender, source, out, (number, 3))
        rows += pq.read_table(out).to_pylist()
    assert [row["id"] for row in rows] == list(range(NUM_REQUESTS))
    for row, request in zip(rows, requests(), strict=True):
        alone = recommender.recommend(request)
        assert row["history"] == request["history"]
        assert row["scores"] == pytest.approx(alone["scores"], abs=1e-6)
        assert {item["item_id"] for item in row["items"]} == {str(item["item_id"]) for item in alone["items"]}
        assert row["error"] is None


def test_lines_in_lines_out(recommender: Recommender, tmp_path: Path) -> None:
    source, out = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n\n" for row in requests()))
    seen: list[tuple[int, int]] = []
    assert (
        score_file(recommender, source, out, progress=lambda done, total: seen.append((done, total)))
        == NUM_REQUESTS
    )
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(answer["scores"]) for answer in answers[:3]] == [1, 2, 10]
    assert seen[-1] == (NUM_REQUESTS, NUM_REQUESTS)


def test_bad_rows_do_not_part_the_good_ones(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "candidates": ["i1"]} if row["task"] == "src" else row for row in requests()[:5]]
    rows[1:1] = [{**rows[0], **BAD}, {**rows[0], "with_text": "yes"}]
    monkeypatch.setattr(module, "CHUNK", len(rows))
    sizes: list[int] = []
    score_parsed = recommender.scorer.score_parsed

    def counted(parsed: Any) -> Any:
        sizes.append(len(parsed))
        return score_parsed(parsed)

    monkeypatch.setattr(recommender.scorer, "score_parsed", counted)
    source = tmp_path / "requests.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_file(recommender, source, tmp_path / "out.jsonl", keep_going=True)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer.get("error") is None for answer in answers] == [True, False, False, True, True, True, True]
    assert sizes == [5]


def test_standard_output_has_the_lines_of_the_file(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a part, of requests without candidates, and of bad ones with --keep-going."""
    monkeypatch.setattr("trainer.registry.store.open_model", lambda *_, **__: recommender)
    source, out = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*requests(), BAD]))

    def call(*options: str) -> Any:
        return CliRunner().invoke(cli, ["score", "runs/one", str(source), *options])

    shown = call("--part", "2/2", "--keep-going")
    score_file(recommender, source, out, (2, 2), keep_going=True)
    assert shown.stdout == out.read_text() and "'nothing'" in shown.stdout
    assert len(shown.stdout.splitlines()) == (NUM_REQUESTS + 1) // 2
    assert "'nothing'" in str(call("--part", "2/2").exception)
    monkeypatch.setattr("trainer.registry.store.open_model", lambda *_, **__: pytest.fail("loaded"))
    assert "1 ≤ I ≤ N" in str(call("--part", "9/2").exception)


def test_a_bad_row_is_named_and_leaves_no_file(recommender: Recommender, tmp_path: Path) -> None:
    source = parquet(tmp_path / "requests.parquet", [*requests()[:7], {**requests()[0], **BAD}])
    out = tmp_path / "out.parquet"
    with pytest.raises(RequestError, match=r"requests\.parquet, rows 6 to 8: request 3: .*'nothing'"):
        score_file(recommender, source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["requests.parquet"]
    score_file(recommender, source, out, keep_going=True)
    rows = pq.read_table(out).to_pylist()
    assert [row["error"] is None for row in rows] == [True] * 7 + [False]
    assert rows[-1]["scores"] is None
    assert "'nothing'" in rows[-1]["error"]


def test_bad_lines_keep_their_places(recommender: Recommender, tmp_path: Path) -> None:
    good = json.dumps(requests()[0])
    source, out = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([good, "{oops", "[1]", good]) + "\n")
    score_file(recommender, source, out, keep_going=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    errors = [row.get("error") or "" for row in rows]
    assert not errors[0] and not errors[3] and rows[0]["scores"] == rows[3]["scores"]
    assert "line 2: not valid JSON" in errors[1] and "line 3: a request is an object" in errors[2]


def test_nothing_is_overwritten_and_formats_are_checked(recommender: Recommender, tmp_path: Path) -> None:
    source, out = parquet(tmp_path / "requests.parquet", requests()), tmp_path / "out.parquet"
    out.write_text("mine")
    with pytest.raises(RunError, match="not overwritten"):
        score_file(recommender, source, out)
    with pytest.raises(RequestError, match=r"out\.csv"):
        score_file(recommender, source, tmp_path / "out.csv")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RequestError, match="holds no request"):
        score_file(recommender, tmp_path / "empty.jsonl", tmp_path / "a.jsonl")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(RequestError, match=r"broken\.parquet: cannot be read"):
        score_file(recommender, tmp_path / "broken.parquet", tmp_path / "b.parquet")


@pytest.mark.parametrize(("count", "parts"), [(0, 1), (5, 3), (3, 5), (100, 7)])
def test_parts_are_a_partition(count: int, parts: int) -> None:
    bounds = [part_of(count, (number, parts)) for number in range(1, parts + 1)]
    assert [place for first, last in bounds for place in range(first, last)] == list(range(count))
    with pytest.raises(RequestError, match="1 ≤ I ≤ N"):
        part_of(count, (parts + 1, parts))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"task": "rec"}\n{oops', "line 2: not valid JSON"),
        ("[1]", "line 1: a request is an object"),
        ("\n", "holds no request"),
        (None, "cannot be read"),
    ],
)
def test_bad_request_files_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "requests.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RequestError, match=message):
        [*range(count_requests(path)), *read_requests(path)]


def test_a_pipe_is_named(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "requests")
    with pytest.raises(RequestError, match="is a pipe"):
        count_requests(pipe)


@pytest.mark.parametrize("line", ['{"a": ' + "[" * 100_000, '{"task": "src", "query": "\\ud800"}'])
def test_odd_lines_are_named_without_a_traceback(recommender: Recommender, tmp_path: Path, line: str) -> None:
    source = tmp_path / "requests.jsonl"
    source.write_text(line + "\n")
    with pytest.raises(RequestError, match=r"requests\.jsonl, (line 1: not valid JSON|rows 1 to 1: .*pair)"):
        score_file(recommender, source, tmp_path / "out.jsonl")


def test_a_column_that_the_answer_would_replace_is_named(recommender: Recommender, tmp_path: Path) -> None:
    rows = [{**row, "scores": "mine"} for row in requests()[:2]]
    source = parquet(tmp_path / "requests.parquet", rows)
    with pytest.raises(RequestError, match="scores"):
        score_file(recommender, source, tmp_path / "out.parquet")


def test_a_parquet_file_that_is_cut_off_inside_is_named(recommender: Recommender, tmp_path: Path) -> None:
    source = parquet(tmp_path / "requests.parquet", requests())
    data = bytearray(source.read_bytes())
    data[4:400] = b"\0" * 396
    source.write_bytes(bytes(data))
    with pytest.raises(RequestError, match=r"requests\.parquet: cannot be read"):
        score_file(recommender, source, tmp_path / "out.parquet")
