"""From a run folder to a registered version that scores alone: same scores, no pickle, clear refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient

from data_shards.schema import read_manifest
from tests.runs import EVALUATION, make_run
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, EnvironmentProblem, RequestError, RunError
from trainer.registry.promote import in_use, promote
from trainer.registry.signature import requirements
from trainer.registry.store import (
    default_uri,
    fetch,
    open_model,
    registered_as,
    registry_of,
    uri_option,
)
from trainer.registry.versions import register
from trainer.runs.weights import load_run_config, load_run_model
from trainer.serving.scorer import Scorer, read_item_ids
from trainer.tracking.store import connect

FULL = {
    "protocol": {"candidates": "full", "num_items": 150, "ranked_by_model": 100},
    "rec": {"recall@10": 0.2, "ndcg@10": 0.1, "mrr@10": 0.05, "num_events": 40},
}


@pytest.fixture(scope="module")
def run_dir(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("natural"), prepared)
    sampled = {**EVALUATION, "baselines": {"lightgcn": {"rec": {"ndcg@10": 0.25, "num_events": 40}}}}
    (run_dir / "evaluation-test.json").write_text(json.dumps(sampled))
    (run_dir / "evaluation-test-full.json").write_text(json.dumps(FULL))
    environment = {"git": {"commit": "0123abc", "dirty": False}, "user": "ada", "command": "gensr train demo"}
    (run_dir / "environment.json").write_text(json.dumps(environment))
    return run_dir


@pytest.fixture(scope="module")
def scorer(run_dir: Path) -> Scorer:
    return Scorer.from_run(run_dir)


@pytest.fixture(scope="module")
def version(run_dir: Path) -> int:
    return register(run_dir, "gensr-test")


def requests() -> list[dict[str, Any]]:
    history = [{"item_id": "i3", "task": "rec"}, {"item_id": "i7", "task": "src"}]
    return [
        {
            "user_id": "u1",
            "history": history,
            "task": "rec",
            "query": None,
            "candidates": ["i1", "i2", "i3", "i4"],
        },
        {"history": history, "task": "src", "query": "red lamp", "candidates": ["i9", "i2"]},
        {"history": [], "task": "rec", "candidates": ["i5"]},
    ]


def test_stored_events_get_the_scores_of_evaluation(run_dir: Path, scorer: Scorer) -> None:
    """A request made from a test event by its original ids scores like the event itself, whichever way
    queries are encoded."""
    model, config, _folder = load_run_model(run_dir)
    catalog = Path(config.data.dir) / "catalog"
    item_ids = read_item_ids(catalog / "items.parquet")
    texts = pd.read_parquet(catalog / "queries.parquet")["text"]
    batch = next(iter(EvalStream(PreparedFolder.at(config.data.dir), "test", config.data, 8)))
    with torch.inference_mode():
        expected = model.score(batch).sigmoid()
    for row in range(batch.num_events):
        history = [
            {"item_id": item_ids[i], "task": ("rec", "src")[t]}
            for i, t, real in zip(
                batch.history_items[row].tolist(),
                batch.history_tasks[row].tolist(),
                batch.history_mask[row].tolist(),
                strict=True,
            )
            if real
        ]
        query = int(batch.query[row])
        request = {
            "history": history,
            "task": ("rec", "src")[int(batch.task[row])],
            "query": texts[query] if query >= 0 else None,
            "candidates": [item_ids[i] for i in batch.candidates[row].tolist()],
        }
        assert scorer.score(request) == pytest.approx(expected[row].tolist(), abs=1e-5)
    assert set(batch.task.tolist()) == {0, 1}


def test_scores_do_not_depend_on_the_other_requests(scorer: Scorer) -> None:
    together = scorer.score_many(requests())
    assert [len(scores) for scores in together] == [4, 2, 1]
    for request, scores in zip(requests(), together, strict=True):
        assert scorer.score(request) == pytest.approx(scores, abs=1e-5)
        assert all(0 < score < 1 for score in scores)


def test_long_candidate_lists_are_split(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    request = {**requests()[0], "candidates": [f"i{n}" for n in range(1, 31)]}
    whole = scorer.score(request)
    monkeypatch.setattr("trainer.serving.scorer.MAX_CANDIDATES", 7)
    assert scorer.score(request) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"candidates": ["i1", "nope", "gone"]},
            "candidates: the model does not know the items 'nope', 'gone'",
        ),
        (
            {"history": [{"item_id": "lost", "task": "rec"}]},
            "history: the model does not know the items 'lost'",
        ),
        ({"candidates": []}, "candidates is empty"),
        ({"candidates": "i1"}, "candidates must be a list"),
        ({"history": ["i1"]}, "history entries look like"),
        ({"task": "buy"}, "task must be 'rec' or 'src', got 'buy'"),
        ({"task": "src"}, "query is missing"),
        ({"query": "lamp"}, "a recommendation takes no query"),
        ({"task": "src", "query": 3.5}, "query must be text"),
    ],
)
def test_bad_requests_are_named(scorer: Scorer, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        scorer.score_many([requests()[0], {**requests()[0], **change}])
    assert "request 2" in str(caught.value)


def test_registered_version_scores_without_the_training_data(
    run_dir: Path, version: int, scorer: Scorer, tmp_path: Path
) -> None:
    uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    data = run_dir.parents[1] / "data"
    expected = scorer.score_many(requests())
    hidden = data.rename(tmp_path / "elsewhere")  # as on another machine
    try:
        got = open_model("models:/gensr-test@candidate", uri).score(requests())
        other = (
            "import json, mlflow, pandas as pd, sys\n"
            "loaded = mlflow.pyfunc.load_model('models:/gensr-test@candidate')\n"
            "print(json.dumps([list(s) for s in "
            "loaded.predict(pd.DataFrame(json.loads(sys.argv[1])))['scores']]))"
        )
        environment = {
            "MLFLOW_TRACKING_URI": uri,
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "HOME": str(tmp_path),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        done = subprocess.run(
            [sys.executable, "-c", other, json.dumps(requests())],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr
        for scores in (got, json.loads(done.stdout.splitlines()[-1])):
            for row, expected_row in zip(scores, expected, strict=True):
                assert row == pytest.approx(expected_row, abs=1e-5)
    finally:
        hidden.rename(data)


@pytest.fixture(scope="module")
def pyfunc(run_dir: Path, version: int) -> Any:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    return mlflow.pyfunc.load_model(f"models:/gensr-test/{version}")


def test_registered_version_answers_both_kinds_of_requests(pyfunc: Any, scorer: Scorer) -> None:
    """Given candidates and the whole catalogue in one table, whose missing cells pandas fills with NaN."""
    whole = {"history": requests()[0]["history"], "task": "src", "query": "garden lamp", "k": 3}
    answers = pyfunc.predict(pd.DataFrame([requests()[0], whole]))
    assert answers["scores"][0] == pytest.approx(scorer.score(requests()[0]), abs=1e-5)
    items = answers["items"][1]
    assert len(items) == 3
    assert (
        [item["score"] for item in items]
        == sorted((item["score"] for item in items), reverse=True)
        == answers["scores"][1]
    )
    assert not {item["item_id"] for item in items} & {"i3", "i7"}
    assert {answers["model"][1][key] for key in ("name", "version")} == {"gensr-test", 1}


def test_a_frame_without_requests_is_answered_without_rows(pyfunc: Any) -> None:
    """Spark hands over partitions that are empty."""
    answers = pyfunc.predict(pd.DataFrame([requests()[0]]).iloc[:0])
    assert (len(answers), list(answers.columns)) == (0, ["items", "scores", "model"])


def test_settings_of_a_whole_table_are_params_and_a_rows_own_go_first(pyfunc: Any) -> None:
    history = requests()[0]["history"]
    rows = [{"task": "rec", "history": history, "k": 2}, {"task": "rec", "history": history}]
    answers = pyfunc.predict(pd.DataFrame(rows), params={"k": 4})
    assert [len(items) for items in answers["items"]] == [2, 4]
    answers = pyfunc.predict(pd.DataFrame(rows[1:]), params={"with_text": True})
    assert len(answers["items"][0]) == 10 and all(item["text"] for item in answers["items"][0])


def test_answers_travel_as_json(pyfunc: Any) -> None:
    """The body that MLflow's scoring server reads and writes."""
    from mlflow.pyfunc import scoring_server

    body = json.dumps(
        {
            "dataframe_records": [
                {
                    "task": "src",
                    "query": "garden lamp",
                    "k": 2,
                    "explain": True,
                    "history": requests()[0]["history"],
                }
            ]
        }
    )
    answer = scoring_server.invocations(body, "application/json", pyfunc, pyfunc.metadata.get_input_schema())
    assert answer.status == 200
    items = json.loads(answer.response)["predictions"][0]["items"]
    assert len(items) == 2
    assert {weight["item_id"] for weight in items[0]["weights"]} == {"i3", "i7"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"task": "rec", "history": [], "candidates": ["nope"]}, r"does not know the items 'nope'"),
        ({"task": "rec", "history": requests()[0]["history"], "k": 0}, "k must be between 1 and 1000, got 0"),
        ({"history": []}, "task"),
    ],
    ids=["item", "k", "column"],
)
def test_registered_version_refuses_bad_requests(pyfunc: Any, bad: dict[str, Any], message: str) -> None:
    """With the error that MLflow's server answers with status 400 and the reason."""
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=message) as caught:
        pyfunc.predict(pd.DataFrame([bad]))
    assert caught.value.get_http_status_code() == 400


def test_version_has_its_facts_and_no_pickle(run_dir: Path, version: int) -> None:
    import mlflow

    uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    client = connect(uri)
    found = client.get_model_version_by_alias("gensr-test", "candidate")
    manifest = read_manifest(run_dir.parents[1] / "data")
    assert int(found.version) == version
    assert found.tags["manifest_hash"] == manifest.hash
    assert found.tags["split_fingerprint"] == manifest.fingerprint
    assert found.tags["commit"] == "0123abc"
    assert found.tags["test/rec/ndcg_at_10"] == "0.4"
    assert "0.4000 [0.3500, 0.4500]" in found.description
    assert f"{manifest.num_items} items" in found.description
    run = client.get_run(found.run_id)
    assert run.info.status == "FINISHED"
    assert {name: value for name, value in run.data.metrics.items() if "ndcg_at_10" in name} == {
        "test/rec/ndcg_at_10": 0.4,
        "test/rec/ndcg_at_10_low": 0.35,
        "test/rec/ndcg_at_10_high": 0.45,
        "test/rec/lightgcn/ndcg_at_10": 0.25,  # so that a chart can show ours against it
        "test-full/rec/ndcg_at_10": 0.1,
    }
    assert {name for name in found.tags if name.startswith("test")} == {
        f"test/rec/{name}" for name in ("recall_at_5", "recall_at_10", "ndcg_at_5", "ndcg_at_10", "mrr")
    }
    assert found.tags["user"] == "ada" == run.data.tags["mlflow.user"]
    assert client.get_registered_model("gensr-test").description.startswith("GenSR for recommendation")
    mlflow.set_tracking_uri(uri)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/gensr-test/{version}"))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin"))]
    assert {
        "artifacts/model/model.safetensors",
        "artifacts/items/items.parquet",
        "artifacts/retrieval/cf.faiss",
        "artifacts/model_card.md",
        "artifacts/evaluation/evaluation-test.json",
        "artifacts/evaluation/evaluation-test-full.json",
        "code/trainer/serving/scorer.py",
    } <= files
    assert not [name for name in files if "cf_folds" in name or name.endswith(".tar")]
    example = (folder / "serving_input_example.json").read_text()
    assert "null" in example and "NaN" not in example  # which JSON has not
    info = mlflow.models.get_model_info(f"models:/gensr-test/{version}")
    assert info.signature.inputs.required_input_names() == ["task"]
    assert {"user_id", "history", "query", "candidates", "k"} <= set(info.signature.inputs.input_names())
    types = {column["name"]: column for column in info.signature.inputs.to_dict()}
    click = types["history"]["items"]["properties"]
    assert {name: field["type"] for name, field in click.items()} == {
        "item_id": "any",
        "task": "string",
        "query": "any",
    }
    outputs = {column["name"]: column for column in info.signature.outputs.to_dict()}
    assert outputs["items"]["items"]["properties"]["score"]["type"] == "double"
    assert {param.name: (str(param.dtype), param.default) for param in info.signature.params.params}["k"] == (
        "DataType.long",
        10,
    )
    assert json.loads((run_dir / "registry.json").read_text())["version"] == version


def test_register_again_makes_the_next_version_and_keeps_the_run(run_dir: Path, version: int) -> None:
    first = json.loads((run_dir / "registry.json").read_text())
    assert register(run_dir, "gensr-test", alias="other") == version + 1
    client = connect(first["uri"])
    assert int(client.get_model_version_by_alias("gensr-test", "candidate").version) == version
    assert json.loads((run_dir / "registry.json").read_text())["run_id"] == first["run_id"]


def test_commands_in_another_folder_name_the_registry(
    run_dir: Path, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow notes the store that it was asked about in MLFLOW_TRACKING_URI, as if the user had said it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = registry_of(run_dir)
    assert fetch(f"models:/gensr-test/{version}", uri).is_dir()
    assert uri_option(uri) == f" --uri {uri}"
    with pytest.raises(RunError, match="which registry"):
        default_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    fetch(f"models:/gensr-test/{version}", uri)
    assert default_uri() == uri and uri_option(uri) == ""


@pytest.mark.parametrize("alias", ["latest", "LATEST", "v3", "bad alias", "", "a/b"])
def test_an_alias_is_checked_before_anything_is_logged(tmp_path: Path, alias: str) -> None:
    with pytest.raises(ConfigError, match="Nothing was registered"):
        register(tmp_path / "no run", "gensr-test", alias=alias)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "hold / : @ [?] #") for name in ("", " ", "a/b", "a:b", "a@b", "a?b", "a#b")),
        *((name, "begin with") for name in ("..", ".", "..a")),
        *((name, "printable text") for name in ("a\nb", "a\x00", "\udcff", "a" * 257)),
    ],
)
def test_so_is_the_name_of_the_model(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"{reason}.*Nothing was registered"):
        register(tmp_path / "no run", name)


def test_an_evaluation_of_other_weights_is_not_registered(run_dir: Path) -> None:
    """`gensr promote` would decide by it. RUN/model of these tests is of step 0."""
    path = run_dir / "evaluation-test.json"
    before = path.read_text()
    protocol = {"candidates": "sampled", "num_negatives": 20, "model_step": 1200}
    path.write_text(json.dumps({**EVALUATION, "protocol": protocol}))
    try:
        with pytest.raises(RunError, match=r"test\.json is of step 1,200, RUN/model is now of step 0"):
            register(run_dir, "gensr-test")
    finally:
        path.write_text(before)


def test_a_run_that_has_not_ended_is_registered_with_a_warning(
    run_dir: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    registered = (run_dir / "registry.json").read_text()
    (run_dir / "status.json").write_text(json.dumps({"status": "stopped", "progress": {"step": 7}}))
    run_id = connect(registry_of(run_dir)).get_model_version("gensr-test", str(version)).run_id
    monkeypatch.setattr("trainer.registry.versions._log_model", lambda *_: (version, run_id))
    monkeypatch.setattr("trainer.registry.versions._compare", lambda *_: None)
    try:
        register(run_dir, "gensr-test", notify=told.append)
    finally:
        (run_dir / "status.json").unlink()
        (run_dir / "registry.json").write_text(registered)
    assert f"warning: {run_dir} is not finished (it has stopped)" in "\n".join(told)


def test_a_failed_registration_leaves_the_run_as_it_was(
    run_dir: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is logged, and after it."""
    import mlflow

    client = connect(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    run_id = client.get_model_version("gensr-test", str(version)).run_id
    status = client.get_run(run_id).info.status

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.pyfunc, "log_model", full)
        with pytest.raises(EnvironmentProblem, match=r"does not register .*No space left"):
            register(run_dir, "gensr-test")
    assert client.get_run(run_id).info.status == status == "FINISHED"
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", full)
    with pytest.raises(
        EnvironmentProblem, match=r"models:/gensr-test/\d+ is registered.*alias \w+ was not moved"
    ):
        register(run_dir, "gensr-test")
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_registration_that_was_killed_is_completed(
    run_dir: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow has the version and the run folder does not say so: it is not made a second time."""
    uri = registry_of(run_dir)
    client = connect(uri)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def versions() -> list[int]:
        return sorted(int(one.version) for one in client.search_model_versions("name='gensr-test'"))

    register(run_dir, "gensr-test", "killed")
    for step in ("_compare", "_describe", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(f"trainer.registry.versions.{step}", killed)
            with pytest.raises(KeyboardInterrupt):
                register(run_dir, "gensr-test", "killed")
        left = versions()
        number = register(os.path.relpath(run_dir), "gensr-test", "killed")  # the same run
        assert left == versions() and number == left[-1]
        assert int(client.get_model_version_by_alias("gensr-test", "killed").version) == number
        assert client.get_model_version("gensr-test", str(number)).tags["user"] == "ada"
        assert number in in_use("gensr-test", uri)
    assert number - 1 not in in_use("gensr-test", uri)
    assert register(run_dir, "gensr-test", "killed") == number + 1  # what was completed is left alone

    with monkeypatch.context() as patch:
        patch.setattr("trainer.registry.versions._compare", killed)
        with pytest.raises(KeyboardInterrupt):
            register(run_dir, "gensr-test", "killed")
    evaluation = run_dir / "evaluation-test.json"
    before = evaluation.read_text()
    evaluation.write_text(before.replace("40", "41"))
    assert register(run_dir, "gensr-test", "killed") == number + 3  # the run has another evaluation now
    evaluation.write_text(before)


def test_a_kill_before_there_is_a_version_leaves_no_second_run(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run trained without tracking gets its MLflow run when it is registered."""
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "registry.json").unlink(missing_ok=True)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.registry.versions.collect_artifacts", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                register(tmp_path / "run", "late")
    register(tmp_path / "run", "late")
    client = connect(registry_of(tmp_path / "run"))
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert client.get_model_version_by_alias("late", "candidate").run_id == run.info.run_id


def test_a_version_in_another_registry_is_none_of_this(run_dir: Path, version: int, tmp_path: Path) -> None:
    uri, other = registry_of(run_dir), f"sqlite:///{tmp_path / 'mlflow.db'}"
    number = register(run_dir, "gensr-test", "here")
    assert registered_as(run_dir, "gensr-test", uri) == number
    assert registered_as(run_dir, "another", uri) == 0
    assert registered_as(run_dir, "gensr-test", other) == 0 and not (tmp_path / "mlflow.db").exists()
    client = connect(other)
    client.create_registered_model("gensr-test")
    for _ in range(number):
        client.create_model_version("gensr-test", f"file://{tmp_path}")
    assert registered_as(run_dir, "gensr-test", other) == 0


def test_files_that_lie_elsewhere_leave_no_copies(
    run_dir: Path, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry is a database, and the files of its versions are in a store like S3."""
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    class Elsewhere(ArtifactRepository):
        def __init__(self, artifact_uri: str, *given: Any, **named: Any) -> None:
            super().__init__(artifact_uri)
            self.there = LocalArtifactRepository(artifact_uri.replace("elsewhere:", "file:", 1))

        def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
            self.there.log_artifact(local_file, artifact_path)

        def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
            self.there.log_artifacts(local_dir, artifact_path)

        def list_artifacts(self, path: str | None = None) -> Any:
            return self.there.list_artifacts(path)

        def _download_file(self, remote_file_path: str, local_path: str) -> None:
            shutil.copy(self.there.get_local_path(remote_file_path), local_path)

    monkeypatch.setitem(_artifact_repository_registry._registry, "elsewhere", Elsewhere)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "registry.json").unlink(missing_ok=True)
    uri = registry_of(tmp_path / "run")
    experiment = load_run_config(run_dir).tracking.experiment
    connect(uri).create_experiment(experiment, artifact_location=f"elsewhere://{tmp_path}/files")
    register(tmp_path / "run", "far")
    assert open_model("models:/far@candidate", uri).score(requests())
    assert not list((tmp_path / "tmp").iterdir())


def test_requirements_cover_what_serving_imports() -> None:
    """A machine with the version's requirements can import all that answering imports, also without what only
    training and evaluation use."""
    only_training = {"accelerate", "bm25s", "deepspeed", "matplotlib", "ninja", "rich", "typer"}
    assert not only_training & {requirement.split("==")[0].lower() for requirement in requirements()}
    code = (
        # None there: the package cannot be imported
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:]))\n"
        "import trainer.serving.recommend, data_shards.text, tokenizers, pandas\n"
        "from trainer.models.backbones import backbone; import transformers.models.t5.modeling_t5"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *only_training], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr


def test_anonymised_words(prepared_words: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, prepared_words, "run.precision=bf16")
    scorer = Scorer.from_run(run_dir)
    vocabulary = scorer.words.vocabulary.tolist()
    request = {
        "history": [],
        "task": "src",
        "query": vocabulary[:2],
        "candidates": read_item_ids(run_dir.parents[1] / "data/catalog/items.parquet")[:3],
    }
    assert scorer.score(request) == scorer.score({**request, "query": " ".join(map(str, vocabulary[:2]))})
    assert scorer.score(request) != scorer.score({**request, "query": vocabulary[2:4]})
    with pytest.raises(RequestError, match="anonymised words"):
        scorer.score({**request, "query": "red lamp"})
    register(run_dir, "words")
    version = open_model("models:/words@candidate", f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    assert version.score([request])[0] == pytest.approx(scorer.score(request), abs=1e-5)
    assert version.scorer.precision == "bf16"  # a GPU would score as it evaluated
    found = version.recommend(
        {"task": "src", "query": vocabulary[:2], "k": 5, "num_candidates": 5, "with_text": True}
    )["items"]
    assert len(found) == 5
    assert all(item["text"] for item in found)


def test_missing_models_are_named(run_dir: Path, version: int, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        open_model(tmp_path)
    with pytest.raises(RunError, match="no such model"):
        open_model("models:/nobody@candidate", f"sqlite:///{run_dir.parent / 'mlflow.db'}")


def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_version_is_read_and_its_folder_not_written(run_dir: Path, version: int) -> None:
    """A store may be mounted read-only, and one folder may be two versions: MLflow copies no files from one
    model to another, and would note in the folder whichever of them was fetched last."""
    uri = registry_of(run_dir)
    client = connect(uri)
    copied = client.copy_model_version(f"models:/gensr-test/{version}", "gensr-copied")
    client.set_registered_model_alias("gensr-copied", "champion", copied.version)
    before = files_of(run_dir.parent / "mlartifacts")
    models = (f"models:/gensr-test/{version}", "models:/gensr-copied@champion", "models:/gensr-copied/latest")
    opened = [open_model(model, uri) for model in models]
    assert files_of(run_dir.parent / "mlartifacts") == before
    assert [(one.facts["name"], one.facts["version"]) for one in opened] == [
        ("gensr-test", version),
        ("gensr-copied", 1),
        ("gensr-copied", 1),
    ]


def test_copies_from_a_server_are_kept_no_longer_than_they_are_read(
    run_dir: Path, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is taken for a server, which sends copies."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("trainer.registry.store._lies_here", lambda model, uri: False)
    uri = registry_of(run_dir)
    fetched: list[str] = []

    def noted(model: str, *given: Any, **named: Any) -> Path:
        fetched.append(model)
        return fetch(model, *given, **named)

    monkeypatch.setattr("trainer.registry.store.fetch", noted)
    model = open_model(f"models:/gensr-test/{version}", uri)
    assert list(tmp_path.iterdir()) == []
    expected = Scorer.from_run(run_dir).score_many(requests())
    assert model.score(requests()) == [pytest.approx(row, abs=1e-5) for row in expected]
    assert model.recommend({**requests()[0], "with_text": True})["items"][0]["text"]
    with pytest.raises(RunError):  # the ranks of the fixture are not there
        promote("gensr-test", uri, dry_run=True)
    again = register(run_dir, "gensr-test", "other")
    assert again > version and list(tmp_path.iterdir()) == []
    artifacts = f"models:/gensr-test/{version}/artifacts"
    assert fetched == [artifacts, f"{artifacts}/evaluation"]  # of promote() no weights
