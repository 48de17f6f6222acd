"""Run folder → model version in the MLflow registry; the way back is store.py's. A version is self-contained:
weights, configuration, tokenizer, item tables, code.

artifacts/model         RUN/model as it is
artifacts/items         item tables, ids and texts, how queries are read (serving/scorer.py: write_items)
artifacts/retrieval     indexes of the catalogue
artifacts/retriever     another model that finds candidates, if one is asked for (serving/retriever.py)
artifacts/evaluation    test evaluations (sampled, hard, full): figures, and the ranks of every event; `gensr
                        promote` reads the sampled ones
code/                   trainer and data_shards
model_card.md           what it is, from facts
"""

import contextlib
import hashlib
import json
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import data_shards
import trainer
from data_shards.checksum import file_sha256
from data_shards.secrets import mask_secrets
from data_shards.settings import read_yaml
from trainer.config import Config
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, EnvironmentProblem, RunError
from trainer.evaluation.evaluated_weights import evaluated_weights, outdated_line, unfinished_line
from trainer.registry.model_card import (
    EVALUATIONS,
    metrics_of,
    model_card,
    model_line,
    named_evaluations,
    run_facts,
    version_tags,
)
from trainer.registry.signature import example_requests, requirements, signature
from trainer.registry.store import ALIAS, fetched, mlflow_at, mlflow_errors, mlflow_exception, place_of_copies
from trainer.runs.retriever_facts import RETRIEVER, retriever_of, retriever_words
from trainer.runs.run_folder import RunFolder, read_json
from trainer.runs.sealed import seal
from trainer.runs.weights import WEIGHTS, load_run_config
from trainer.runtime.files import write_json
from trainer.runtime.progress import Notify, silent
from trainer.serving.artifacts import write_items
from trainer.serving.retrieval import run_retrieval
from trainer.serving.retriever import Retriever, chosen_retriever, open_retriever
from trainer.serving.scorer import Scorer
from trainer.tracking.about import about_run
from trainer.tracking.store import connect, is_server, log_figures, open_experiment, tracking_uri

MAX_NAME = 256  # characters that every database of MLflow takes
# between the run's scores and the registered version's, after a float32 round trip
MAX_SCORE_DIFFERENCE = 1e-4
CONTENT_TAG = "gensr.content"  # of an MLflow run that was made to register: _content_of() the version
NUM_LOOKED_AT = 10  # newest versions, for one that a killed registration has left


def register(
    run_dir: str | Path,
    name: str,
    alias: str = ALIAS,
    notify: Notify = silent,
    retriever: str | Path | None = None,
) -> int:
    """Log RUN as a pyfunc model in its own MLflow run, register it as a new version of `name`, move `alias`
    to it. Returns the version.

    The alias moves only after the version, loaded back, gives the run's own scores. Indexes of the catalogue
    are built first, where RUN/retrieval does not have them; `notify` is told the memory they need.
    retriever: a run folder, whose model the version then holds, too; "" for none; default: the run's
    serving.retriever.
    Raises RunError when the run has no model or the version scores differently, what open_retriever()
    raises, EnvironmentProblem when MLflow refuses.
    """
    check_names(name, alias)
    run_dir = Path(run_dir)
    config = load_run_config(run_dir)
    uri = tracking_uri(config, run_dir)
    _check_place(uri, run_dir)
    folder = PreparedFolder.open(config.data)
    scorer = Scorer.from_run(run_dir)
    refuse_unservable(scorer.model.reads(config.model), config.model.name, run_dir)
    indexes = run_retrieval(run_dir, scorer.model, notify, must_be_kept=True)
    facts = run_facts(run_dir, config, folder.manifest, scorer.model.tasks)
    chosen = chosen_retriever(config, retriever)
    other = open_retriever(
        chosen,
        model_dir=RunFolder(run_dir).model,
        tasks=facts["tasks"],
        item_ids=scorer.item_ids,
        retrieval=indexes,
        notify=notify,
    )
    if other is not None:
        ranker = other.scorer.model
        refuse_unservable(ranker.reads(ranker.settings), ranker.settings.name, Path(chosen))
        facts[RETRIEVER] = dict(other.facts)
    refuse_outdated(run_dir, facts)
    refuse_other_retriever(run_dir, facts)
    stood = evaluated_weights(run_dir)
    if unfinished := unfinished_line(run_dir, stood["run_status"], stood["model_step"]):
        notify(f"warning: {unfinished}")
    example = example_requests(folder, scorer.model.tasks)
    expected = scorer.score_many(example)
    with mlflow_errors(f"MLflow at {uri} does not register {run_dir}"):
        client, content = connect(uri), _content_of(run_dir, facts)
        number, run_id = _left_by_a_kill(client, run_dir, name, content, uri) or _log_model(
            run_dir, name, config, scorer, other, facts, example, content, uri
        )
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, "FINISHED")
        for evaluated, figures in named_evaluations(facts).items():
            log_figures(client, run_id, metrics_of(figures, evaluated))
    done = f"models:/{name}/{number} is registered, but not checked: the alias {alias} was not moved"
    with mlflow_errors(f"MLflow at {uri} does not complete it. {done}"):
        _compare(expected, _predict(f"models:/{name}/{number}", uri, example), name, number)
        _describe(client, name, number, facts, run_id)
        client.set_registered_model_alias(name, alias, str(number))
    kept = f"models:/{name}/{number} is registered, also as models:/{name}@{alias}"
    document = {"name": name, "version": number, "alias": alias, "uri": mask_secrets(uri), "run_id": run_id}
    write_json(RunFolder(run_dir).registry, document, kept)
    return number


def _describe(client: Any, name: str, number: int, facts: dict[str, Any], run_id: str) -> None:
    for key, value in version_tags(facts, run_id).items():
        client.set_model_version_tag(name, str(number), key, value)
    client.update_model_version(name, str(number), description=model_card(name, facts))
    if not client.get_registered_model(name).description:  # what somebody wrote stays
        client.update_registered_model(name, description=model_line(facts))


def refuse_unservable(needs: frozenset[str], name: str, run_dir: Path) -> None:
    """Raises RunError for a model that cannot answer without the prepared folder. needs: Ranker.reads()."""
    reasons = {
        "texts": "it reads the texts of the prepared folder",
        "users": "it knows the users of the training data only, by their rows",
    }
    if lacking := [reason for need, reason in reasons.items() if need in needs]:
        raise RunError(
            f"{run_dir}: {name} cannot be registered: {' and '.join(lacking)}, and a version has to "
            "answer without them. Evaluate it where it is: gensr evaluate RUN"
        )


def refuse_outdated(run_dir: Path, facts: dict[str, Any]) -> None:
    """Raises RunError for an evaluation of other weights than those that would be registered: `gensr promote`
    decides by it."""
    for name, evaluation in named_evaluations(facts).items():
        if outdated := outdated_line(run_dir, name, evaluation["protocol"]):
            raise RunError(outdated)


def refuse_other_retriever(run_dir: Path, facts: dict[str, Any]) -> None:
    """Raises RunError where the evaluation of the whole catalogue has other candidates than the version would
    find: `gensr promote --candidates full` decides by it."""
    evaluation = facts["full_evaluation"]
    if not evaluation:
        return
    then, now = retriever_of(evaluation["protocol"]), retriever_of(facts)
    if then.get("weights_sha256") != now.get("weights_sha256"):
        run, retriever = shlex.quote(str(run_dir)), shlex.quote(now.get("run", ""))
        again = f"gensr evaluate {run} --candidates full --retriever {retriever}"
        raise RunError(
            f"{RunFolder(run_dir).evaluation('test-full')} was made with the retriever "
            f"{retriever_words(then) or 'none'}, and the version would have "
            f"{retriever_words(now) or 'none'}. Evaluate again with: {again}"
        )


def check_names(name: str, alias: str) -> None:
    """MLflow's rules for names, asked before anything is logged. Raises ConfigError."""
    problem = ""
    if not name.strip() or re.search("[/:@?#]", name):  # MLflow finds no models:/a@b/VERSION
        problem = f"{name!r} cannot be the name of a registered model: it must not be empty or hold / : @ ? #"
    elif name == "." or name.startswith(".."):  # the name becomes a folder of a store on this machine
        problem = f"{name!r} cannot be the name of a registered model: it must not be '.' or begin with '..'"
    elif not name.isprintable() or len(name) > MAX_NAME:
        problem = (
            f"{name[:80]!r} cannot be the name of a registered model: it must be printable text of at most "
            f"{MAX_NAME} characters"
        )
    elif not re.fullmatch(r"[\w-]{1,255}", alias):
        problem = f"--alias {alias!r}: an alias has letters, digits, '_' and '-' only"
    elif alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        problem = f"--alias {alias}: MLflow keeps latest and v<number> for itself"
    if problem:
        raise ConfigError(f"{problem}. Nothing was registered.")


def _predict(model: str, uri: str, requests: list[dict[str, Any]]) -> list[list[float]]:
    """Scores as MLflow's own server would give them."""
    import pandas as pd

    with place_of_copies(model, uri) as folder:
        loaded = mlflow_at(uri).pyfunc.load_model(model, dst_path=str(folder) if folder else None)
        return [list(scores) for scores in loaded.predict(pd.DataFrame(requests))["scores"]]


def _content_of(run_dir: Path, facts: dict[str, Any]) -> str:
    """sha256 of what a version of this run would be, from wherever its folders are named."""
    weights = file_sha256(RunFolder(run_dir).model / WEIGHTS)
    named: dict[str, Any] = {"run": str(run_dir.resolve())}
    if RETRIEVER in facts:
        named[RETRIEVER] = {**facts[RETRIEVER], "run": str(Path(facts[RETRIEVER]["run"]).resolve())}
    return hashlib.sha256(json.dumps([weights, facts | named], sort_keys=True).encode()).hexdigest()


def _left_by_a_kill(client: Any, run_dir: Path, name: str, content: str, uri: str) -> tuple[int, str] | None:
    """(version, id of its MLflow run) of the same content that is newer than what the run folder knows: the
    process that made it was killed before it could say so."""
    known = read_json(RunFolder(run_dir).registry)
    quote = '"' if "'" in name else "'"
    newest = client.search_model_versions(
        f"name={quote}{name}{quote}", max_results=NUM_LOOKED_AT, order_by=["version_number DESC"]
    )
    for one in newest:
        told = known.get("name") == name and known.get("run_id") == one.run_id
        if told and int(one.version) <= int(known["version"]):
            continue
        with fetched(f"models:/{name}/{one.version}/MLmodel", uri) as file:
            if (read_yaml(file).get("metadata") or {}).get("content") == content:
                return int(one.version), str(one.run_id)
    return None


def _log_model(
    run_dir: Path,
    name: str,
    config: Config,
    scorer: Scorer,
    retriever: Retriever | None,
    facts: dict[str, Any],
    example: list[dict[str, Any]],
    content: str,
    uri: str,
) -> tuple[int, str]:
    """→ (version, id of the MLflow run it belongs to). The run keeps the status it had."""
    import pandas as pd

    client, mlflow = connect(uri), mlflow_at(uri)
    folder = PreparedFolder.open(config.data)
    run_id = _run_id(run_dir, client)
    if not run_id:  # trained with tracking.enabled=false
        experiment_id = open_experiment(client, uri, config.tracking.experiment, run_dir)
        left = client.search_runs([experiment_id], f"tags.`{CONTENT_TAG}` = '{content}'", max_results=1)
        tags = about_run(config, RunFolder(run_dir).read_environment(), folder.manifest)
        made = {**tags, CONTENT_TAG: content}  # found again if this process is killed before the version is
        run = left[0] if left else client.create_run(experiment_id, run_name=run_dir.name, tags=made)
        run_id = run.info.run_id
    status = client.get_run(run_id).info.status
    with tempfile.TemporaryDirectory(prefix="gensr-register-") as temporary:
        folders = collect_artifacts(Path(temporary), run_dir, name, folder, scorer, retriever, facts)
        try:
            with mlflow.start_run(run_id=run_id):
                logged = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                    artifacts={key: path.resolve().as_uri() for key, path in folders.items()},
                    code_paths=[str(Path(package.__path__[0])) for package in (trainer, data_shards)],
                    signature=signature(),
                    input_example=pd.DataFrame(example, dtype=object),  # None stays null
                    pip_requirements=requirements(),
                    registered_model_name=name,
                    metadata={
                        "manifest_hash": facts["manifest_hash"],
                        "split_fingerprint": facts["split_fingerprint"],
                        "content": content,
                    },
                )
        finally:  # a registration that fails does not make a finished run a failed one
            with contextlib.suppress(mlflow_exception()):
                client.update_run(run_id, status=status)
    return int(logged.registered_model_version), run_id


def collect_artifacts(
    into: Path,
    run_dir: Path,
    name: str,
    folder: PreparedFolder,
    scorer: Scorer,
    retriever: Retriever | None,
    facts: dict[str, Any],
) -> dict[str, Path]:
    """What a version holds, by the names of its artifacts: of the run folder, or written `into` a folder."""
    run = RunFolder(run_dir)
    found = {"model": run.model, "items": into / "items", "card": into / "model_card.md"}
    known = {key: facts[key] for key in ("manifest_hash", "split_fingerprint", "commit", "data_dir")}
    write_items(found["items"], scorer, folder.items("item_id", "text"), known)
    found["card"].write_text(model_card(name, facts), encoding="utf-8")
    if scorer.model.views():  # else there are no indexes
        found["retrieval"] = run.retrieval
    if retriever is not None:
        found[RETRIEVER] = into / RETRIEVER
        retriever.save(found[RETRIEVER])
    files = [file for kind in EVALUATIONS for file in (run.evaluation(kind), run.ranks(kind))]
    if there := [file for file in files if file.is_file()]:
        found["evaluation"] = into / "evaluation"
        found["evaluation"].mkdir()
        for file in there:
            shutil.copy2(file, found["evaluation"])
        seal(found["evaluation"])
    return found


def _check_place(uri: str, run_dir: Path) -> None:
    """MLflow reads the path of a model on this machine as a URL when it loads the model: "x%20y" as "x y"."""
    place = run_dir.resolve().parent
    if not is_server(uri) and unquote(str(place)) != str(place):
        raise EnvironmentProblem(
            f"{place}: MLflow cannot load a model from a path with an escape such as %20 in it. Rename the "
            "folder, or register with an MLflow server: tracking.uri=http://… in the run's config.yaml"
        )


def _run_id(run_dir: Path, client: Any) -> str:
    """The MLflow run of training, else of an earlier registration; "" when the store does not have it."""
    for file in (RunFolder(run_dir).tracking, RunFolder(run_dir).registry):
        run_id = read_json(file).get("run_id", "")
        if run_id:
            with contextlib.suppress(mlflow_exception()):
                return str(client.get_run(run_id).info.run_id)
    return ""


def _compare(expected: list[list[float]], got: list[list[float]], name: str, number: int) -> None:
    differences = [
        abs(a - b) for row, other in zip(expected, got, strict=True) for a, b in zip(row, other, strict=True)
    ]
    if not max(differences) <= MAX_SCORE_DIFFERENCE:
        raise RunError(
            f"version {number} of {name} scores differently from its run (by {max(differences):.3g}); the "
            "alias was not moved"
        )
