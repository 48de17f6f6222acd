"""The gate to `champion`, in a real registry (sqlite): versions that hold nothing but an evaluation."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from data_shards.checksum import file_sha256
from trainer.cli import app
from trainer.errors import ConfigError, RunError
from trainer.evaluation.bootstrap import paired_difference
from trainer.registry import promote as module
from trainer.registry.promote import decided, judge, promote, rollback
from trainer.tracking.store import connect

EVENTS = 600  # of each task


def write_evaluation(folder: Path, quality: dict[str, float], seed: int = 0, **protocol: Any) -> Path:
    """Ranks of the same events: a candidate list of 100, the clicked item first with a chance of `quality`,
    else anywhere."""
    hard = protocol.pop("hard", None)  # the same for both tasks, among hard candidates
    rng = np.random.default_rng(7)  # what is easy and hard is the same for every model
    ease, place = rng.random(2 * EVENTS), rng.integers(1, 100, size=2 * EVENTS).astype(float)
    task = np.repeat(["rec", "src"], EVENTS)
    rank = np.where(ease < np.repeat([quality["rec"], quality["src"]], EVENTS), 1.0, place)
    order = np.random.default_rng(seed).permutation(2 * EVENTS)  # rows of a file may stand in any order
    evaluation = folder / "artifacts" / "evaluation"
    evaluation.mkdir(parents=True)
    event_id = np.arange(2 * EVENTS) + protocol.pop("first_event", 0)
    columns = {
        "event_id": event_id,
        "task": task,
        "user_id": event_id // 4,
        "rank": rank,
        "num_tied": np.ones(2 * EVENTS, np.int64),
        "history_length": np.where(np.arange(2 * EVENTS) % 10 == 0, "0", "1–4"),
    }
    for bucket, value in protocol.pop("by_history", {}).items():
        columns["rank"] = np.where(columns["history_length"] == bucket, value, columns["rank"])
    for name in protocol.pop("without", ()):
        del columns[name]
    facts = {"candidates": "sampled", "num_negatives": 99, "manifest_hash": "abc", **protocol}
    write_ranks(evaluation, "test", pa.table(columns).take(order), facts)
    if hard is not None:
        columns["rank"] = np.where(ease < hard, 1.0, place)
        write_ranks(evaluation, "test-hard", pa.table(columns), {**facts, "candidates": "hard"})
    return folder


def write_model(folder: Path, **settings: Any) -> None:
    """What is read of a model to tell it from another."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    about = {"name": "gensr", "settings": {"layers": 2, **settings}, "data": {}, "precision": "fp32"}
    (folder / "model.json").write_text(json.dumps({"format": 2, **about}))


def write_ranks(folder: Path, name: str, table: pa.Table, protocol: dict[str, Any]) -> None:
    pq.write_table(table, folder / f"evaluation-{name}.parquet")
    (folder / f"evaluation-{name}.json").write_text(json.dumps({"protocol": protocol}))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    connect(uri).create_registered_model("empty")
    return uri


@pytest.fixture
def registry(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, str, Callable[..., int]]:
    """(client, name, add): add(rec=…, src=…) makes a version of the model `name` with the alias candidate and
    returns its number."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    client, name = connect(store), tmp_path.name
    client.create_registered_model(name)

    def add(rec: float = 0.3, src: float = 0.3, evaluated: bool = True, **protocol: Any) -> int:
        number = len(list(tmp_path.iterdir())) + 1
        folder = tmp_path / f"version-{number}"
        folder.mkdir()
        if evaluated:
            write_evaluation(folder, {"rec": rec, "src": src}, seed=number, **protocol)
        (folder / "MLmodel").write_text("flavors: {}\n")
        assert int(client.create_model_version(name, source=folder.as_uri()).version) == number
        client.set_registered_model_alias(name, "candidate", str(number))
        return number

    return client, name, add


def champion(client: Any, name: str) -> int:
    return int(client.get_model_version_by_alias(name, "champion").version)


def test_first_better_worse_and_back(registry: tuple[Any, str, Callable[..., int]]) -> None:
    client, name, add = registry
    first = add()
    assert promote(name).promoted
    assert champion(client, name) == first

    better = add(rec=0.45)
    dry = promote(name, dry_run=True)
    assert dry.promoted
    assert champion(client, name) == first
    assert not [tag for tag in client.get_model_version(name, str(better)).tags if tag.startswith("promote")]
    decision = promote(name)
    assert (decision.promoted, decision.champion, champion(client, name)) == (True, first, better)
    tags = client.get_model_version(name, str(better)).tags
    assert tags["promote.decision"] == "promoted"
    assert decision.figures["rec"]["difference"] > 0.05
    assert float(tags["promote.rec.difference"]) == pytest.approx(
        decision.figures["rec"]["difference"], rel=1e-4
    )
    assert float(tags["promote.src.difference"]) == 0
    assert not promote(name).promoted  # the champion already
    assert client.get_model_version(name, str(better)).tags["promote.decision"] == "promoted"

    mixed = add(rec=0.6, src=0.2)  # one task gains, the other falls
    refused = promote(name)
    assert not refused.promoted
    assert "src may fall" in refused.reason
    assert champion(client, name) == better
    assert client.get_model_version(name, str(mixed)).tags["promote.decision"] == "refused"
    assert promote(name, margin=0.5).promoted  # unless the margin allows it
    assert champion(client, name) == mixed

    assert rollback(name, dry_run=True) == (mixed, better)
    assert rollback(name) == (mixed, better)
    assert champion(client, name) == better
    assert not promote(name, margin=0.5).promoted  # candidate is still the version that was rolled back
    assert rollback(name) == (better, first)
    with pytest.raises(RunError, match="first champion"):
        rollback(name)


def test_a_run_may_stand_for_the_champion(
    registry: tuple[Any, str, Callable[..., int]], store: str, tmp_path: Path
) -> None:
    """A candidate of newer data, whose events the champion's own evaluation does not have."""
    client, name, add = registry
    first = add()
    promote(name)
    weights = tmp_path / "version-1" / "artifacts" / "model" / "model.safetensors"
    write_model(weights.parent)
    newer: dict[str, Any] = {"manifest_hash": "newer", "first_event": 5000}
    second = add(rec=0.3, src=0.3, **newer)
    with pytest.raises(RunError, match="different data"):
        promote(name)
    run, other = (tmp_path.parent / f"{tmp_path.name}-{kind}" for kind in ("carried", "other"))
    for folder, digest in ((run, file_sha256(weights)), (other, "another")):
        write_evaluation(folder, {"rec": 0.3, "src": 0.3}, begun_with=digest, **newer)
        for file in (folder / "artifacts" / "evaluation").iterdir():
            file.rename(folder / file.name)
        write_model(folder / "model")
    with pytest.raises(RunError, match="not evaluated with the weights of version 1"):
        promote(name, against=other)
    write_model(run / "model", layers=3)  # the weights fit where their names do
    with pytest.raises(RunError, match="has another settings than version 1"):
        promote(name, against=run)
    write_model(run / "model", younger=True)
    refused = promote(name, against=run)
    assert (refused.promoted, refused.reason) == (False, "no task gains beyond what chance explains")
    assert refused.lines()[1] == f"  champion: its weights on the candidate's data, {run}"
    assert decided(name, second, store)["decision"] == "refused"
    assert champion(client, name) == first
    accepted = promote(name, against=run, gain=False)
    assert accepted.promoted and champion(client, name) == second
    tags = client.get_model_version(name, str(second)).tags
    assert (tags["promote.against"], tags["promote.gain"]) == (str(run), "not asked")
    found = decided(name, second, store)
    assert (found["decision"], found["champion"]) == ("promoted", "1")
    assert found["figures"]["rec"]["difference"] == 0
    assert found["figures"]["src"]["candidate"] == pytest.approx(accepted.figures["src"]["b"], rel=1e-5)
    assert decided(name, first, store)["figures"] == {}
    client.set_registered_model_alias(name, "champion", str(first))
    assert decided(name, second, store) == {}  # stopped before the alias moved: to be done again
    with pytest.raises(RunError, match="version 2 was registered meanwhile"):
        promote(name, version=first)
    add(rec=0.2, src=0.3, **newer)
    assert "rec may fall" in promote(name, against=run, gain=False).reason


def test_a_champion_that_has_moved_meanwhile_is_not_overruled(
    registry: tuple[Any, str, Callable[..., int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs at once: the comparison was with another champion."""
    client, name, add = registry
    first = add()
    promote(name)
    second, third = add(rec=0.45), add(rec=0.6)

    def slow(*arguments: Any) -> Any:
        client.set_registered_model_alias(name, "champion", str(second))
        return decide(*arguments)

    decide = module._decide
    with monkeypatch.context() as patch:
        patch.setattr(module, "_decide", slow)
        with pytest.raises(RunError, match=f"champion has become version {second} meanwhile"):
            promote(name)
    assert champion(client, name) == second
    assert not [tag for tag in client.get_model_version(name, str(third)).tags if tag.startswith("promote")]
    assert promote(name).promoted
    found = module.find_version
    seen = iter([found(client, name, "champion")])  # by rollback, before it moves
    client.set_registered_model_alias(name, "champion", str(first))
    monkeypatch.setattr(module, "find_version", lambda *given: next(seen, None) or found(*given))
    with pytest.raises(RunError, match="champion has become"):
        rollback(name)


def test_equal_models_do_not_change_places(registry: tuple[Any, str, Callable[..., int]]) -> None:
    client, name, add = registry
    first = add()
    promote(name)
    add()
    decision = promote(name)
    assert (decision.promoted, decision.reason) == (False, "no task gains beyond what chance explains")
    assert champion(client, name) == first


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"manifest_hash": "xyz"}, "different data"),
        ({"num_negatives": 20}, "different candidates"),
        ({"candidates": "full"}, "different candidates"),
        ({"first_event": 3}, "different events"),
        ({"evaluated": False}, "holds no evaluation"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    registry: tuple[Any, str, Callable[..., int]], other: dict[str, Any], message: str
) -> None:
    client, name, add = registry
    first = add()
    promote(name)
    add(rec=0.9, src=0.9, **other)
    with pytest.raises(RunError, match=message):
        promote(name)
    assert champion(client, name) == first


def test_missing_names_are_errors(registry: tuple[Any, str, Callable[..., int]]) -> None:
    for name in ("empty", "nobody"):
        with pytest.raises(RunError, match="no version with the alias candidate"):
            promote(name)
        with pytest.raises(RunError, match="nothing to roll back"):
            rollback(name)


def test_the_rule() -> None:
    rng = np.random.default_rng(0)
    before = rng.integers(1, 50, size=400).astype(float)
    gain = paired_difference(1 / before, 1 / np.maximum(before - 1, 1), np.arange(400) // 4)
    figures: dict[str, dict[str, Any]] = {"rec": {"ci95": [gain.low, gain.high]}}
    assert judge(figures, 0.0)[0]
    assert not judge({"rec": {"ci95": [-gain.high, -gain.low]}}, 0.0)[0]
    assert not judge({**figures, "src": {"ci95": [-0.02, 0.03]}}, 0.01)[0]
    assert judge({**figures, "src": {"ci95": [-0.02, 0.03]}}, 0.03)[0]
    for unknown in ([math.nan, math.nan], [-0.001, math.nan], [0.1, math.inf]):  # of too few events
        promoted, reason = judge({**figures, "src": {"ci95": unknown}}, 0.01)
        assert not promoted and "no interval for src" in reason
    assert not judge({"rec": {"ci95": [0.2, 0.2], "num_users": 1}}, 0.01)[0]  # one user shows no spread
    assert judge({}, 0.01) == (False, "no interval for any task: there is too little to compare")


def test_a_segment_may_refuse(registry: tuple[Any, str, Callable[..., int]]) -> None:
    client, name, add = registry
    add(by_history={"0": 1.0})
    promote(name)
    better = add(rec=0.6, src=0.6, by_history={"0": 40.0})  # new users are forgotten
    refused = promote(name, segment_margin=0.05)
    assert not refused.promoted
    assert "rec history length 0" in refused.reason
    assert set(refused.segments["rec"]["history_length"]) == {"0", "1–4"}
    assert client.get_model_version(name, str(better)).tags["promote.segment_margin"] == "0.05"
    assert promote(name, margin=0.2).promoted
    with pytest.raises(RunError, match="--segment-margin"):
        promote(name, segment_margin=-1)


def test_a_champion_of_before_num_tied_is_compared(registry: tuple[Any, str, Callable[..., int]]) -> None:
    _, name, add = registry
    add(without=("num_tied", "history_length"))
    promote(name)
    old = add(rec=0.6, without=("num_tied", "history_length"))
    assert promote(name, dry_run=True).promoted
    with pytest.raises(RunError, match="without segments"):
        promote(name, segment_margin=0.1)
    assert add(rec=0.6) == old + 1
    decision = promote(name, segment_margin=0.1)
    assert decision.promoted
    assert set(decision.segments["src"]["history_length"]) == {"0", "1–4"}


def test_hard_candidates_may_decide(registry: tuple[Any, str, Callable[..., int]]) -> None:
    client, name, add = registry
    first = add(rec=0.3)
    with pytest.raises(RunError, match=r"no hard evaluation\. Run gensr evaluate RUN --candidates hard"):
        promote(name, candidates="hard")
    first = add(rec=0.3, hard=0.3)
    assert promote(name, candidates="hard").promoted
    better = add(rec=0.3, hard=0.5)
    assert not promote(name, dry_run=True).promoted  # the same on sampled candidates
    decision = promote(name, candidates="hard")
    assert (decision.promoted, decision.candidates, decision.champion) == (True, "hard", first)
    assert champion(client, name) == better
    assert client.get_model_version(name, str(better)).tags["promote.metric"] == "ndcg@10, hard"
    assert "rec  ndcg@10, hard  champion" in "\n".join(decision.lines())
    shown = CliRunner().invoke(app, ["promote", name, "--candidates", "hard", "--json"])
    assert json.loads(shown.stdout)["candidates"] == "hard"
    with pytest.raises(ConfigError, match="sampled, hard or full, got soft"):
        promote(name, candidates="soft")


def test_command(registry: tuple[Any, str, Callable[..., int]]) -> None:
    _, name, add = registry
    add()
    first = CliRunner().invoke(app, ["promote", name, "--json"])
    assert json.loads(first.stdout)["promoted"] is True
    add(rec=0.5)
    shown = CliRunner().invoke(app, ["promote", name, "--dry-run"])
    assert "dry run: nothing was changed" in shown.stdout
    assert "would not be promoted: " in shown.stdout or "would be promoted: " in shown.stdout
    assert "rec  ndcg@10, sampled" in shown.stdout
    assert CliRunner().invoke(app, ["promote", name]).exit_code == 0
    assert (
        json.loads(CliRunner().invoke(app, ["promote", name, "--rollback", "--json"]).stdout)["champion"] == 1
    )
