"""`import gensr`: the examples of its docstrings run, and what they do not show."""

import doctest
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gensr
from data_shards.settings import overrides_of, to_dict
from tests.runs import make_run
from tests.worlds import write_tables
from trainer.configs import load_config

ROOT = Path(__file__).parents[2]
MIXED = pd.DataFrame({"user_id": [1, "anna"]}, dtype=object)
TIMELESS = pd.DataFrame({"user_id": ["u1"], "item_id": ["i1"], "text": ["red lamp"]})


@pytest.fixture(scope="module")
def world(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples find in the current folder: raw/, data/, runs/mine."""
    folder = tmp_path_factory.mktemp("python")
    write_tables(folder / "raw")
    run_dir = make_run(folder, prepared, "tracking.enabled=false")
    run_dir.rename(run_dir.with_name("mine"))
    return folder


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def model() -> gensr.Model:
    return gensr.load("runs/mine")


@pytest.mark.parametrize("module", ["gensr.model", "gensr.steps"])
def test_examples_run(module: str) -> None:
    """In the order of the file, with the names of the examples before."""
    found = doctest.DocTestFinder(exclude_empty=True).find(import_module(module))
    examples = sorted((test for test in found if test.examples), key=lambda test: test.lineno or 0)
    assert len(examples) >= 4
    names: dict[str, Any] = {}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in examples:
        example.globs = names
        report: list[str] = []
        assert runner.run(example, out=report.append, clear_globs=False).failed == 0, "".join(report)


def test_every_name_is_there_and_no_other() -> None:
    assert set(gensr.__all__) == set(gensr.HOMES) == set(dir(gensr))
    assert all(getattr(gensr, name) is not None for name in gensr.__all__)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = gensr.nothing_of_that_name


def test_frames_of_pairs_and_of_requests_give_the_same_scores(model: gensr.Model) -> None:
    """Also where rows of one request are not neighbours, and with history, query and user of every form."""
    candidates = ["i3", "i7", "i20"]
    for asked in ({"user_id": "u3"}, {"history": ["i1", "i2"], "query": "garden lamp"}):
        (expected,) = model.score([{**asked, "candidates": candidates}])["scores"]
        pairs = [{**asked, "item_id": item} for item in candidates]
        pairs.insert(1, {"user_id": "u4", "item_id": "i9"})
        scored = model.score(pd.DataFrame(pairs))
        assert scored.drop(index=1)["score"].tolist() == pytest.approx(expected, abs=1e-6)
        assert list(scored["item_id"]) == ["i3", "i9", "i7", "i20"]


def test_a_history_is_ids_or_a_frame(model: gensr.Model) -> None:
    of_ids = model.recommend(history=["i1", "i2"], k=4)
    of_frame = model.recommend(history=pd.DataFrame({"item_id": ["i1", "i2"], "task": ["rec", "rec"]}), k=4)
    pd.testing.assert_frame_equal(of_ids, of_frame)
    searched = model.recommend(history=pd.DataFrame({"item_id": ["i1", "i2"], "task": ["src", "src"]}), k=4)
    assert searched["score"].tolist() != of_ids["score"].tolist()


def test_other_columns_are_carried_and_do_not_part_a_request(
    model: gensr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pd.DataFrame({"user_id": ["u3"] * 3, "item_id": ["i1", "i2", "i3"]})
    expected = model.score(pairs)["score"].tolist()
    asked: list[Any] = []
    score = model._recommender.score

    def counted(requests: Any, *names: Any) -> Any:
        asked.extend(requests)
        return score(requests, *names)

    monkeypatch.setattr(model._recommender, "score", counted)
    labelled = model.score(pairs.assign(label=[1, 0, 0], text=["a", "b", "c"]))
    assert labelled["score"].tolist() == expected and labelled["label"].tolist() == [1, 0, 0]
    assert len(asked) == 1


def test_rows_without_a_value_are_as_if_the_column_were_not_there(model: gensr.Model) -> None:
    """A frame fills them with NaN or NA, of whatever type its columns are."""
    rows: list[dict[str, Any]] = [
        {"user_id": "u3", "item_id": "i1"},
        {"history": ["i1", "i2"], "item_id": "i2"},
        {"user_id": "u3", "query": "garden lamp", "item_id": "i3"},
    ]
    expected = [model.score([row])["score"][0] for row in rows]
    frame = pd.DataFrame(rows)
    assert model.score(frame)["score"].tolist() == pytest.approx(expected, abs=1e-6)
    frame = frame.astype({"query": "string", "user_id": "string"})
    assert model.score(frame)["score"].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_history_that_a_frame_gave_can_be_asked_with(model: gensr.Model) -> None:
    clicks = model.history("u3")
    assert clicks["query"].notna().tolist() == (clicks["task"] == "src").tolist()
    frame = pd.DataFrame([{"item_id": "i1"}, {"item_id": "i2", "task": "src", "query": "garden lamp"}])
    history = [{"item_id": "i1", "task": "rec"}, {"item_id": "i2", "task": "src", "query": "garden lamp"}]
    pd.testing.assert_frame_equal(model.recommend(history=frame, k=3), model.recommend(history=history, k=3))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: model.recommend(), "whose recommendations"),
        (lambda model: model.recommend(user=float("nan")), "whose recommendations"),  # of a frame
        (lambda model: model.recommend(user="u3", history=["i1"]), "one of them"),
        (lambda model: model.recommend(user="nobody"), "nobody"),
        (lambda model: model.score(pd.DataFrame({"user_id": ["u3"]})), "item_id"),
        (lambda model: model.score(pd.DataFrame({"user_id": ["u3"], "item_id": ["none"]})), "none"),
        (lambda model: model.score(pd.DataFrame({"user": ["u3"], "item_id": ["i1"]})), "row 1.*'user_id'"),
        (lambda model: model.score([{"item_id": "i1"}]), "row 1: whose recommendation"),
        (lambda model: model.recommend(history=12), "history must be a list"),
        (lambda model: model.recommend(history="23"), "history must be a list"),
        (lambda model: model.recommend(history={"item_id": "i1"}), "history must be a list"),
        (lambda model: model.search(None), "query is missing"),
        (lambda model: model.search(5), "query must be text"),
        (lambda model: gensr.load("runs/none"), "runs/none"),
        (lambda model: gensr.evaluate("runs/mine", retriever="none"), "a retriever finds candidates"),
        (lambda model: gensr.prepare(pd.DataFrame({"user_id": ["u"]}), "out"), r"\(events, items\)"),
        (lambda model: gensr.prepare((MIXED, MIXED), "out"), "events: .*one type"),
        (lambda model: gensr.prepare((TIMELESS, TIMELESS), "out"), "^events: column time is missing"),
        (
            lambda model: gensr.prepare((TIMELESS.assign(time="in.parquet: no"), TIMELESS), "out"),
            "^events:time:row 1: must be .* got 'in.parquet: no'$",
        ),
        (lambda model: gensr.train("demo", settings={"optim.lrr": 1}), "^1 problem in the given settings\n"),
        (lambda model: gensr.cf("data", {"cf.dim": {1, 2}}), r"settings: \{1, 2\}"),
        (lambda model: gensr.evaluate("runs/mine", candidates="all"), "sampled, hard or full"),  # type: ignore[arg-type]
        (lambda model: gensr.prepare(("e", "i"), "out", source="amazon"), "data frames"),
        (lambda model: gensr.prepare("raw", "out", vocabsize=400), "vocab_size"),
    ],
)
def test_mistakes_are_explained(model: gensr.Model, ask: Any, message: str) -> None:
    with pytest.raises(gensr.GensrError, match=message):
        ask(model)


@pytest.mark.parametrize("resume", [True, "yes"])
def test_resume_is_never_or_auto(resume: Any, tmp_path: Path) -> None:
    """Anything but auto started the run anew, without a word."""
    with pytest.raises(gensr.GensrError, match=f"resume must be 'never' or 'auto', got {resume!r}"):
        gensr.train("demo", data=tmp_path / "data", run=tmp_path / "run", resume=resume)


def test_settings_become_what_the_command_line_says() -> None:
    settings = {
        "optim": {"lr": 3e-4},
        "data.dir": Path("a b"),
        "run.init_from": "",
        "tracking.enabled": False,
    }
    settings |= {"tracking.run_name": "no", "tracking.experiment": "3: x", "model.name": "gensr"}
    settings |= {"run.seed": np.int64(3), "optim.weight_decay": np.float64(0.5)}
    config = to_dict(load_config("demo", overrides_of(settings)))
    assert config["optim"]["lr"] == 3e-4
    assert (config["run"]["seed"], config["optim"]["weight_decay"]) == (3, 0.5)
    assert config["data"]["dir"] == "a b"
    assert config["tracking"]["run_name"] == "no"
    assert config["tracking"]["experiment"] == "3: x"
    assert config["tracking"]["enabled"] is False


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=environment)


def test_a_trainer_py_of_the_user(tmp_path: Path) -> None:
    """`python -m gensr` works beside it; in Python, the error says which file is in the way."""
    (tmp_path / "trainer.py").write_text("print('mine')\n")
    assert python(tmp_path, "-m", "gensr", "--version").stdout.startswith("gensr ")
    assert python(tmp_path, "-m", "trainer", "--version").stdout == "mine\n"
    hidden = python(tmp_path, "-c", "import gensr; gensr.load")
    assert hidden.returncode == 1
    assert f"{tmp_path / 'trainer.py'} hides the package 'trainer'" in hidden.stderr


def test_a_bad_pair_is_named_by_its_row(model: gensr.Model) -> None:
    """Rows of one request are asked together, so its number is another one."""
    pairs = pd.DataFrame({"user_id": ["u3", "u3", "u4"], "item_id": ["i1", "i2", "nothing"]})
    with pytest.raises(gensr.GensrError, match=r"^row 3: .*'nothing'"):
        model.score(pairs)
    with pytest.raises(gensr.GensrError, match=r"^row 2: .*'nobody'"):
        model.score([{"user_id": user, "candidates": ["i1"]} for user in ("u3", "nobody")])


def test_bytes_are_not_a_list_of_words(model: gensr.Model) -> None:
    with pytest.raises(gensr.GensrError, match="query must be text"):
        model.search(b"lamp", user="u3")
