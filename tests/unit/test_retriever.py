"""Another model as a first stage: what joins the union, which runs are refused, what is said about it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from data_shards.schema import REC, SRC
from tests.runs import make_other_run, make_run
from trainer.cli import app
from trainer.config import DataConfig
from trainer.data import EvalStream
from trainer.errors import ConfigError, DataError, GensrError, RunError
from trainer.evaluation.compare import compare, compare_lines
from trainer.evaluation.full import evaluate_full
from trainer.evaluation.summary import protocol_line
from trainer.models.zoo import model_class, model_names
from trainer.registry.promote import Decision, decision_tags
from trainer.registry.versions import refuse_other_retriever
from trainer.runs.retriever_facts import retriever_of, retriever_words
from trainer.runs.weights import load_run_model
from trainer.serving.recommend import Recommender
from trainer.serving.requests import ParsedRequest
from trainer.serving.retrieval import fused, union
from trainer.serving.retriever import Retriever, _best_known, open_retriever

NUM_EVENTS = 24
HISTORY = ParsedRequest(items=[3, 9, 21], tasks=[0, 0, 0], task=REC, query=None, candidates=[])
SEARCH = ParsedRequest(items=[3, 9], tasks=[0, 0], task=SRC, query="garden lamp", candidates=[])


@pytest.fixture(scope="module")
def run_dir(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("retriever"), prepared)


@pytest.fixture(scope="module")
def sasrec(run_dir: Path) -> Path:
    return make_other_run(run_dir, "sasrec", "model.dim=8", "model.ffn_dim=8", "data.history_max=3")


@pytest.fixture(scope="module")
def two_tower(run_dir: Path) -> Path:
    return make_other_run(run_dir, "two_tower", "model.dim=8")


@pytest.fixture(scope="module")
def item_knn(run_dir: Path) -> Path:
    return make_other_run(run_dir, "item_knn")


@pytest.fixture
def lightgcn(run_dir: Path) -> Path:
    """It reads less of a history than a request or the ranking model may have."""
    return make_other_run(run_dir, "lightgcn", "data.history_max=3")


def test_it_has_half_of_the_places() -> None:
    beside = np.arange(100, 110)
    assert union([], 4, exclude=[101], beside=beside).tolist() == [100, 102, 103, 104]
    assert union([], 4).tolist() == []


def test_two_orders_become_one() -> None:
    """By hand: 1/61 + ¼/62 for 5, 1/62 for 3, 1/63 + ¼/61 for 8, 1/64 for 1."""
    assert fused(np.array([5, 3, 8, 1]), np.array([8, 5])).tolist() == [5, 8, 3, 1]
    assert fused(np.array([5, 3]), np.array([], np.int64)).tolist() == [5, 3]


def test_it_is_one_more_list(run_dir: Path, sasrec: Path) -> None:
    """Half of the candidates are its best, in turns with the indexes', which are kept."""
    alone, joined = Recommender.from_run(run_dir), Recommender.from_run(run_dir, retriever=sasrec)
    assert joined.retriever is not None
    best = joined.retriever.best(HISTORY, 20, [9])
    scores_I = joined.retriever.scorer.score_catalogue(HISTORY)
    scores_I[9] = -torch.inf
    assert best.tolist() == scores_I.topk(20).indices.tolist()
    found, own = (one.candidates(HISTORY, 20, [9]).tolist() for one in (joined, alone))
    assert len(found) == len(set(found)) == 20 and 9 not in found
    assert set(best[:10].tolist()) <= set(found)
    assert set(own[:6]) <= set(found) <= set(best.tolist()) | set(own)
    assert found != own
    answer = joined.recommend({"task": "rec", "history": [{"item_id": "i3", "task": "rec"}], "k": 5})
    assert answer["model"]["retriever"] == str(sasrec) and len(answer["items"]) == 5
    assert "retriever" not in alone.facts


def test_the_pre_ranking_orders_it_too(prepared: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, prepared, "model.evidence=true")
    other = make_other_run(run, "sasrec", "model.dim=8", "model.ffn_dim=8")
    joined = Recommender.from_run(run, retriever=other)
    assert joined.retriever is not None and joined.retrieval is not None
    assert joined.retrieval.pre_ranking is not None
    asked: list[np.ndarray] = []
    real = joined.scorer.pre_ranked

    def noted(*arguments: object, **named: object) -> np.ndarray:
        asked.append(arguments[-1])  # type: ignore[arg-type]
        return real(*arguments, **named)  # type: ignore[arg-type]

    joined.scorer.pre_ranked = noted  # type: ignore[method-assign]
    every = joined.candidates(HISTORY, 150, [])
    best = joined.retriever.best(HISTORY, 150)
    assert asked[0].tolist() == best.tolist() and set(best.tolist()) <= set(every.tolist())


def test_a_task_that_it_does_not_serve(run_dir: Path, sasrec: Path) -> None:
    lines: list[str] = []
    joined = Recommender.from_run(run_dir, retriever=sasrec, notify=lines.append)
    alone = Recommender.from_run(run_dir)
    said = [line for line in lines if "does not serve src: the model's own indexes do" in line]
    assert len(said) == 1 and said[0].startswith("SASRec (")
    assert joined.candidates(SEARCH, 20, []).tolist() == alone.candidates(SEARCH, 20, []).tolist()
    assert len([line for line in lines if "does not serve" in line]) == 1


def test_a_counted_model_does_not_fill_up_with_what_it_does_not_know(run_dir: Path, item_knn: Path) -> None:
    retriever = Retriever.from_run(item_knn)
    scores_I = retriever.scorer.score_catalogue(HISTORY)
    assert len(retriever.best(HISTORY, 1000)) == int((scores_I > 0).sum())
    assert _best_known(torch.zeros(5), 3, []).tolist() == []
    assert _best_known(torch.tensor([0.0, 2.0, 1.0, 0.0]), 3, [1]).tolist() == [2]


@pytest.mark.parametrize("name", ["sasrec", "two_tower", "item_knn", "lightgcn"])
def test_events_and_requests_get_the_same(name: str, run_dir: Path, request: pytest.FixtureRequest) -> None:
    """Evaluation reads batches of the prepared folder, a service reads requests."""
    retriever, answering = (Retriever.from_run(request.getfixturevalue(name)) for _ in range(2))
    _, config, folder = load_run_model(run_dir)
    stream = EvalStream(folder, "test", config.data, 8, max_events=NUM_EVENTS)
    texts = folder.query_texts()
    longest = stream.read_as(DataConfig(history_max=folder.manifest.history_max))
    for whole, mine in zip(longest, stream.read_as(retriever.scorer.model.world.data), strict=True):
        assert whole.event_id.tolist() == mine.event_id.tolist()
        lists = retriever.best_of_events(mine, whole, 10, [[1]] * 8)
        for row, found in enumerate(lists):
            task, length = int(mine.task[row]), int(whole.history_mask[row].sum())
            asked = ParsedRequest(
                items=whole.history_items[row, :length].tolist(),
                tasks=whole.history_tasks[row, :length].tolist(),
                task=task,
                query=texts[int(mine.query[row])] if task == SRC else None,
                candidates=[],
                user=int(mine.user[row]),
            )
            assert found.tolist() == answering.best(asked, 10, [1]).tolist(), (name, row)
            assert bool(len(found)) or task not in retriever.scorer.model.tasks or name == "item_knn"


# ---- which runs are refused --------------------------------------------------------------------------------


def test_which_models_retrieve() -> None:
    yes = {name for name in model_names() if model_class(name).retrieves()}
    assert {"two_tower", "sasrec", "bpr_mf", "lightgcn", "item_knn", "unisar", "bm25", "popularity"} <= yes
    assert not yes & {"gensr", "collm", "idgenrec", "din", "din_search"}


def copied(run: Path, name: str, change: Callable[[Path], None]) -> Path:
    other = run.with_name(name)
    shutil.copytree(run, other)
    change(other)
    return other


def with_document(**values: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / "model" / "model.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        (run / "model" / "files.json").unlink()  # as of an older run: not sealed

    return change


def with_status(status: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / "status.json").write_text(json.dumps({"status": status, "progress": {"step": 1}}))

    return change


def test_refusals(run_dir: Path, sasrec: Path, tmp_path: Path) -> None:
    din = make_other_run(run_dir, "din")
    bm25 = make_other_run(run_dir, "bm25")
    cases: list[tuple[object, type[GensrError], str]] = [
        ("models:/other/1", ConfigError, "it must be a run folder"),
        (tmp_path / "gone", RunError, "holds no trained model"),
        (run_dir, ConfigError, "is the model itself"),
        (copied(run_dir, "copy", lambda run: None), ConfigError, "is the model itself"),
        (din, ConfigError, "din has no cheap scores of the whole catalogue"),
        (copied(sasrec, "stopped", with_status("stopped")), RunError, "is not finished (it has stopped)"),
        (
            copied(sasrec, "split", with_document(split_fingerprint="f" * 64)),
            DataError,
            "was trained on another split",
        ),
        (
            copied(sasrec, "folder", with_document(manifest_hash="f" * 64)),
            DataError,
            "was trained on another prepared folder",
        ),
    ]
    for retriever, kind, message in cases:
        with pytest.raises(kind, match=re.escape(message)):
            Recommender.from_run(run_dir, retriever=str(retriever))
    own = Recommender.from_run(run_dir)
    with pytest.raises(ConfigError, match="serves src only, and the model rec"):
        open_retriever(bm25, run_dir / "model", ["rec"], own.scorer.item_ids, own.retrieval)
    for ids in (["i0"], list(own.scorer.item_ids)[::-1]):
        with pytest.raises(
            DataError, match=r"other item ids. Train one on the same: gensr train PRESET data"
        ):
            open_retriever(sasrec, run_dir / "model", ["rec"], ids, own.retrieval)
    with pytest.raises(ConfigError, match="sasrec ranks the whole catalogue itself"):
        Recommender.from_run(sasrec, retriever=run_dir)


# ---- what is said about it ---------------------------------------------------------------------------------


def test_evaluations_name_it(run_dir: Path, sasrec: Path, item_knn: Path) -> None:
    few = {"max_events": NUM_EVENTS, "with_baselines": False}
    plain = evaluate_full(run_dir, **few)  # type: ignore[arg-type]
    assert "retriever" not in plain["protocol"] and "with the retriever" not in protocol_line(plain)
    joined = evaluate_full(run_dir, **few, retriever=sasrec)  # type: ignore[arg-type]
    facts = joined["protocol"]["retriever"]
    assert (facts["run"], facts["model"], facts["tasks"]) == (str(sasrec), "sasrec", ["rec"])
    assert len(facts["weights_sha256"]) == 64
    assert joined["protocol"]["config_hash"] == plain["protocol"]["config_hash"]
    assert f"with the retriever SASRec ({sasrec}, weights {facts['weights_sha256'][:8]})" in protocol_line(
        joined
    )
    comparison = compare([run_dir, run_dir], candidates="full")
    assert comparison["retrievers"] == {str(run_dir): retriever_words(facts)}
    assert f"  {run_dir}: with the retriever {retriever_words(facts)}" in compare_lines(comparison)
    with pytest.raises(RunError, match=r"with the retriever SASRec .* and the version would have none"):
        refuse_other_retriever(run_dir, {"full_evaluation": joined})
    refuse_other_retriever(run_dir, {"full_evaluation": joined, "retriever": facts})
    with pytest.raises(RunError, match=r"the retriever none, and the version would have SASRec"):
        refuse_other_retriever(run_dir, {"full_evaluation": plain, "retriever": facts})
    refuse_other_retriever(run_dir, {"full_evaluation": plain})


def test_the_runs_own_key(run_dir: Path, sasrec: Path) -> None:
    path = run_dir / "config.yaml"
    before = path.read_text()
    try:
        path.write_text(yaml.safe_dump({**yaml.safe_load(before), "serving": {"retriever": str(sasrec)}}))
        assert Recommender.from_run(run_dir).retriever is not None
        assert Recommender.from_run(run_dir, retriever="").retriever is None
        tree = yaml.safe_load(before)
        del tree["serving"]  # an older run
        path.write_text(yaml.safe_dump(tree))
        assert Recommender.from_run(run_dir).retriever is None
    finally:
        path.write_text(before)


def test_decisions_name_it() -> None:
    decision = Decision("n", 2, 1, True, "why", retrievers={"candidate": "SASRec (runs/s, weights 01)"})
    assert "  candidate: with the retriever SASRec (runs/s, weights 01)" in decision.lines()
    assert decision_tags(decision)["promote.candidate.retriever"] == "SASRec (runs/s, weights 01)"


def test_a_damaged_file_has_none() -> None:
    assert retriever_of({"retriever": 7}) == retriever_of(None) == retriever_of({}) == {}
    assert retriever_words({}) == ""


@pytest.mark.parametrize("candidates", ["sampled", "hard"])
def test_given_candidates_need_none(candidates: str) -> None:
    words = ["evaluate", "runs/a", "--candidates", candidates, "--retriever", "runs/b"]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, ConfigError) and f"the {candidates} ones are given" in str(error)
