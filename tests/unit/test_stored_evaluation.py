"""What is read of RUN/evaluation-NAME.json: what evaluate writes, and nothing damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import RunError
from trainer.evaluation.stored import read_evaluation_file

REPORT = {"num_events": 4, "ndcg@10": 0.5, "ci95": {"ndcg@10": [0.4, 0.6]}}
FULL = {"protocol": {"candidates": "full"}, "rec": {**REPORT, "retrieval": {"recall@100": 0.9}}}


def written(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "evaluation-test-full.json"
    path.write_text(json.dumps(document))
    return path


def test_an_evaluation_of_the_whole_catalogue_is_read(tmp_path: Path) -> None:
    assert read_evaluation_file(written(tmp_path, FULL)) == FULL


@pytest.mark.parametrize("value", [10**400, True, "0.5", None, [0.5]])
def test_what_is_no_number_is_refused(tmp_path: Path, value: Any) -> None:
    """An integer of 400 digits is none that can be shown."""
    for report in ({**REPORT, "ndcg@10": value}, {**REPORT, "ci95": {"ndcg@10": [value, 0.6]}}):
        with pytest.raises(RunError, match="damaged"):
            read_evaluation_file(written(tmp_path, {**FULL, "rec": report}))


def test_the_command_that_mends_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, {})
    with pytest.raises(RunError, match="gensr evaluate RUN --split test --candidates full"):
        read_evaluation_file(path)
    (tmp_path / "config.yaml").touch()  # a run
    with pytest.raises(RunError, match=f"gensr evaluate {tmp_path} --split test --candidates full"):
        read_evaluation_file(path)


def test_an_interval_that_ends_before_it_begins_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="damaged"):
        read_evaluation_file(written(tmp_path, {**FULL, "rec": {**REPORT, "ci95": {"ndcg@10": [0.6, 0.4]}}}))


@pytest.mark.parametrize("retrieval", [[0.9], {"recall@100": "0.9"}, None])
def test_a_damaged_recall_of_the_retrieval_is_refused(tmp_path: Path, retrieval: Any) -> None:
    path = written(tmp_path, {**FULL, "rec": {**REPORT, "retrieval": retrieval}})
    with pytest.raises(RunError, match="damaged"):
        read_evaluation_file(path)


def test_beams_without_what_they_reach_are_refused(tmp_path: Path) -> None:
    decoded = {**FULL, "protocol": {"candidates": "full", "num_beams": 20}}
    whole = {**decoded, "rec": {**REPORT, "share_reached": 0.2}}
    assert read_evaluation_file(written(tmp_path, whole)) == whole
    with pytest.raises(RunError, match="damaged"):
        read_evaluation_file(written(tmp_path, decoded))
