"""gensr table without training: plan, spaces, trials, comparison, published numbers, rendering."""

import csv
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from data_shards.settings import flatten, key_help, overrides_of, parse_yaml, to_dict, to_yaml
from tests.tiny_folder import make_tiny_folder
from trainer.cli import app
from trainer.configs import config_type, load_config, preset_names
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, DataError, RunError
from trainer.evaluation.bootstrap import paired_difference
from trainer.evaluation.metrics import FIGURES
from trainer.evaluation.summary import read_evaluation
from trainer.experiments import cells, search, verbs
from trainer.experiments import submit as jobs
from trainer.experiments.cells import Cell
from trainer.experiments.table import results, run, tuning
from trainer.experiments.table.plan import Request, make_plan
from trainer.experiments.table.render import csv_text, html, markdown, value_cell
from trainer.experiments.table.submission import plan_submission
from trainer.experiments.verbs import VerbFailed
from trainer.models.zoo import model_class, model_names

SPACES = parse_yaml((Path(tuning.__file__).parent / "spaces.yaml").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("prepared") / "data")


# ---- plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("sasrek",)}, "Did you mean sasrec"),
        ({"models": ("sasrec", "sasrec")}, "twice"),
        ({"candidates": ("ful",)}, "unknown candidates ful; choose from sampled, hard, full"),
        ({"epochs": 1.0, "max_steps": 2}, "give one of them"),
        ({"presets": {"gensr": "demo"}}, "not among the models"),
        ({"presets": {"sasrec": "gru4rec"}}, "one of gru4rec"),
        ({"overrides": ("run.seed=3",)}, "sets run.seed itself"),
    ],
)
def test_what_cannot_be_is_refused(data: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    request = Request(str(data), tmp_path / "out", **{"models": ("sasrec",), **options})
    with pytest.raises(ConfigError, match=message):
        make_plan(request)
    assert not (tmp_path / "out").exists()


def test_hard_candidates_are_refused_where_the_folder_has_none(data: Path, tmp_path: Path) -> None:
    request = Request(
        str(data), tmp_path / "out", models=("popularity",), candidates=("sampled", "hard", "full")
    )
    with pytest.raises(DataError, match="hard_negatives=99 overwrite=true"):
        make_plan(request)
    assert not (tmp_path / "out").exists()


def with_hard_candidates(data: Path, folder: Path) -> Path:
    """A copy whose manifest says that there are some; nothing here reads the events."""
    shutil.copytree(data, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["hard_negatives"] = 12
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert PreparedFolder.at(folder).manifest.num_hard_negatives == 12
    return folder


def test_other_settings_are_refused_and_more_cells_are_not(data: Path, tmp_path: Path) -> None:
    first: dict[str, Any] = {"folder": str(data), "out": tmp_path, "models": ("sasrec",), "max_steps": 2}
    plan = make_plan(Request(**first))
    assert plan.configs["sasrec"].run.max_steps == 2 and plan.configs["sasrec"].model.name == "sasrec"
    make_plan(Request(**{**first, "models": ("sasrec", "popularity"), "seeds": 5}))
    with pytest.raises(ConfigError, match=r"sasrec's run\.max_steps was 2, is 3"):
        make_plan(Request(**{**first, "max_steps": 3}))
    with pytest.raises(ConfigError, match="trials was 0, is 4"):
        make_plan(Request(**{**first, "trials": 4}))


def test_a_table_and_its_data_may_move(data: Path, tmp_path: Path) -> None:
    first: dict[str, Any] = {"folder": str(data), "out": tmp_path / "a", "models": ("popularity",)}
    make_plan(Request(**first))
    (tmp_path / "a").rename(tmp_path / "b")
    shutil.copytree(data, tmp_path / "data")
    moved = {**first, "out": tmp_path / "b", "folder": str(tmp_path / "data")}
    plan = make_plan(Request(**moved))
    assert plan.configs["popularity"].tracking.uri == f"sqlite:///{tmp_path}/b/mlflow.db"
    with pytest.raises(ConfigError, match=r"popularity's tracking\.uri"):
        make_plan(Request(**moved, overrides=("tracking.uri=sqlite:////elsewhere/runs.db",)))


def test_a_preset_reads_the_histories_that_the_folder_has(data: Path, tmp_path: Path) -> None:
    """Presets name the length of the paper's data; a folder with shorter histories is read whole."""
    length = PreparedFolder.at(data).manifest.history_max
    names = tuple(name for name in model_names() if name in preset_names())
    assert any(load_config(name).data.history_max > length for name in names)
    plan = make_plan(Request(str(data), tmp_path / "out", models=names))
    for config in plan.configs.values():
        plan.folder.check_settings(config.data)
    asked = make_plan(Request(str(data), tmp_path / "asked", models=names, overrides=("data.history_max=1",)))
    assert {config.data.history_max for config in asked.configs.values()} == {1}


def test_counted_systems_have_one_seed_and_no_trials(data: Path, tmp_path: Path) -> None:
    request = Request(str(data), tmp_path, seeds=3, trials=4)
    assert [len(request.seeds_of(name)) for name in ("popularity", "sasrec", "gensr")] == [1, 3, 3]
    assert [request.trials_of(name) for name in ("popularity", "sasrec", "gensr")] == [0, 4, 4]


# ---- tuning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in model_names() if model_class(name).trained])
def test_spaces_name_keys_that_exist_and_hold_the_published_values(name: str) -> None:
    keys = {one.key for one in key_help(config_type(name))}
    assert set(SPACES["models"].get(name, {})) <= keys
    config = load_config(None, [f"model.name={name}", "optim.lr=0.5"])
    space = tuning.space_of(config)
    assert space["optim.lr"]["high"] == 0.5
    values = flatten(to_dict(config))
    for key, domain in space.items():
        inside = domain if isinstance(domain, list) else [values[key]]
        assert values[key] in inside


def test_words_of_a_trial_are_read_back() -> None:
    settings = {"optim.lr": 3.2e-05, "model.num_layers": 3}
    values = flatten(to_dict(load_config("sasrec", list(overrides_of(settings)))))
    assert {key: values[key] for key in settings} == settings


def lr_of(words: tuple[str, ...]) -> float:
    return float(dict(word.split("=") for word in words)["optim.lr"])


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    config = load_config("sasrec")

    def objective(number: int, words: tuple[str, ...]) -> float:
        seen.append((number, words))
        if number == 2:
            raise RunError("no memory")
        return -abs(lr_of(words) - 2e-3)

    seen: list[tuple[int, tuple[str, ...]]] = []
    best = tuning.tune(tmp_path / "a" / "sasrec.json", config, 5, objective)
    whole, seen = seen, []

    def interrupted(number: int, words: tuple[str, ...]) -> float:
        if number == 3:
            raise KeyboardInterrupt
        return objective(number, words)

    with pytest.raises(KeyboardInterrupt):
        tuning.tune(tmp_path / "b" / "sasrec.json", config, 5, interrupted)
    assert tuning.tune(tmp_path / "b" / "sasrec.json", config, 5, objective) == best
    assert seen == whole and [number for number, _ in seen] == list(range(5))
    assert lr_of(whole[0][1]) == config.optim.lr, "trial 0 has the published settings"
    document = json.loads((tmp_path / "b" / "sasrec.json").read_text())
    assert document["failed"] == 1 and document["values"]["2"] is None
    tuning.tune(tmp_path / "b" / "sasrec.json", config, 5, lambda number, words: pytest.fail("ran again"))


def test_a_journal_that_does_not_say_its_space_is_read_by_its_trials(tmp_path: Path) -> None:
    """As older ones do not: no sampler could read trials of two spaces, and optuna says so in a traceback."""
    journal, space = tmp_path / "x.journal", {"optim.lr": [0.001, 0.01], "model.dropout": [0.0, 0.1]}
    study = search.open_study(journal)
    study.tell(study.ask(search._distributions(space)).number, 0.5)
    assert search.search(journal, space, 2, lambda number, words: 0.1) == []
    other = tmp_path / "y.journal"
    study = search.open_study(other)
    study.tell(study.ask(search._distributions(space)).number, 0.5)
    with pytest.raises(ConfigError, match=r"begun with another search: space was .*0\.01"):
        search.search(other, {**space, "optim.lr": [0.001, 0.1]}, 2, lambda number, words: 0.1)


def test_a_search_whose_trials_all_fail_begins_again(tmp_path: Path) -> None:
    def failing(number: int, words: tuple[str, ...]) -> float:
        raise RunError("no memory")

    with pytest.raises(RunError, match="all 2 trials failed; the last: no memory"):
        tuning.tune(tmp_path / "sasrec.json", load_config("sasrec"), 2, failing)
    assert tuning.tune(tmp_path / "sasrec.json", load_config("sasrec"), 2, lambda number, words: 1.0)


# ---- cells -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("step 1\ngensr: 1 problem in x\n  optim.lr  must be\n", 1, "1 problem in x"),
        ("Traceback (most recent call last):\n  File\nValueError: no\n\n", 1, "ValueError: no"),
        ("step 1\n", -9, "ended by signal 9"),
        ("", 3, "exit code 3"),
    ],
)
def test_the_line_that_names_an_error(tmp_path: Path, text: str, code: int, line: str) -> None:
    (tmp_path / "log").write_text(text)
    assert verbs.error_line(tmp_path / "log", code) == line


def test_each_kind_of_candidates_is_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("sasrec", "seed-0", tmp_path, tmp_path, (), tmp_path / "log")
    (tmp_path / "status.json").write_text('{"status": "finished"}')
    for name in ("test.json", "test.parquet", "test-full.json"):  # the ranks of test-full are missing
        (tmp_path / f"evaluation-{name}").write_text("{}")
    ran: list[list[str]] = []
    monkeypatch.setattr(cells, "run_gensr", lambda words, log, mode="w": ran.append(list(words)))
    kinds = ("sampled", "hard", "full")
    cells.evaluate_cell(cell, kinds, 50)
    asked = ["evaluate", str(tmp_path), "--split", "test", "--candidates"]
    assert ran == [
        [*asked, "hard", "--no-baselines"],  # every event of the split, as with sampled candidates
        [*asked, "full", "--events", "50", "--no-baselines"],
    ]
    (tmp_path / "evaluation-test-full.parquet").write_text("")
    assert cells.is_done(cell, ("sampled", "full")) and not cells.is_done(cell, kinds)
    for ending in ("json", "parquet"):
        (tmp_path / f"evaluation-test-hard.{ending}").write_text("{}")
    assert cells.is_done(cell, kinds)


def test_the_stages_of_a_model_are_runs_that_follow_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request("data", tmp_path, models=("collm",), seeds=2)
    cell = run.cells_of(request, "collm", {"optim.lr": 0.01})[1]
    first = tmp_path / "runs" / "collm" / "seed-1-stage-1"
    both = ["tracking.run_name=collm-seed-1", "run.seed=1", "optim.lr=0.01"]
    assert [one.training_overrides for one in cell.runs] == [
        [f"run.dir={first}", *both, "model.stage=text", "tracking.enabled=false"],
        [f"run.dir={cell.run_dir}", *both, "model.stage=map", f"run.init_from={first}"],
    ]
    ran: list[str] = []
    monkeypatch.setattr(cells, "run_gensr", lambda words, log, mode="w": ran.append(words[2]))
    cells.train_cell(cell)
    first.mkdir(parents=True)
    (first / "status.json").write_text('{"status": "finished"}')
    cells.train_cell(cell)
    assert ran == [f"run.dir={path}" for path in (first, cell.run_dir, cell.run_dir)]


def test_stages_are_the_tables_own(data: Path, tmp_path: Path) -> None:
    request = Request(str(data), tmp_path, models=("collm",), overrides=("model.stage=map",))
    with pytest.raises(ConfigError, match=r"model.stage=map: the table sets model.stage itself"):
        make_plan(request)


def test_a_failed_cell_is_named_and_the_rest_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    failing = {"sasrec seed-0"}

    def train_cell(cell: Cell) -> None:
        trained.append(cell.title)
        if cell.title in failing:
            raise VerbFailed("gensr train: ended by signal 9")
        (cell.run_dir).mkdir(parents=True)
        (cell.run_dir / "status.json").write_text('{"status": "finished"}')

    def evaluate_cell(cell: Cell, candidates: tuple[str, ...], events: int) -> None:
        for ending in ("json", "parquet"):
            (cell.run_dir / f"evaluation-test.{ending}").write_text("{}")

    def read_results(plan: Any, cells: Any, errors: dict[str, str]) -> dict[str, Any]:
        errors_seen.append(errors)
        return {"rows": []}

    errors_seen: list[dict[str, str]] = []
    monkeypatch.setattr(run, "train_cell", train_cell)  # of a trial
    monkeypatch.setattr(cells, "train_cell", train_cell)
    monkeypatch.setattr(cells, "evaluate_cell", evaluate_cell)
    monkeypatch.setattr(run, "read_results", read_results)
    monkeypatch.setattr(run, "write_table", lambda document, out: [])
    lines: list[str] = []
    request = Request(str(data), tmp_path, models=("popularity", "sasrec"), seeds=2, candidates=("sampled",))
    run.make_table(request, lines.append)
    assert trained == ["popularity seed-0", "sasrec seed-0", "sasrec seed-1"]
    assert errors_seen[0]["sasrec seed-0"].startswith("gensr train: ended by signal 9 (")
    assert lines[0] == "[1/3] popularity seed-0" and "left" in lines[1]
    trained.clear()
    failing.clear()
    run.make_table(request, lines.append)
    assert trained == ["sasrec seed-0"] and errors_seen[1] == {}


def test_a_table_without_any_result_ends_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = made_up()
    monkeypatch.setattr("trainer.experiments.table.make_table", lambda request, notify: document)
    assert CliRunner().invoke(app, ["table", "data", str(tmp_path)]).exit_code == 0
    document["rows"] = [row for row in document["rows"] if not row["results"]]
    done = CliRunner().invoke(app, ["table", "data", str(tmp_path)])
    assert "no run of the table has results" in str(done.exception) and "wrote" in done.output


# ---- results -----------------------------------------------------------------------------------------------


def test_each_system_against_the_best_other_one() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 3)
    base = rng.random(120)
    values = {"b": base + 0.05, "a": base, "c": base - 0.2 + 0.3 * rng.random(120)}
    found = results.against_best(values, users)
    assert (found["a"]["model"], found["c"]["model"], found["b"]["model"]) == ("b", "b", "a")
    assert found["b"]["difference"] == pytest.approx(0.05) and found["a"]["difference"] == pytest.approx(
        -0.05
    )
    alone = {name: paired_difference(values["b"], values[name], users, 2000) for name in ("a", "c")}
    assert found["c"]["low"] == pytest.approx(alone["c"].low), "the same resamples as one by one"
    p = {name: difference.p_value for name, difference in alone.items()}
    smallest = min(p.values())
    assert found["a"]["p_holm"] == pytest.approx(2 * smallest) and found["b"]["p"] == p["a"]
    assert results.against_best({"a": base}, users) == {}


def test_a_clear_difference_stays_clear_among_many_systems() -> None:
    """The bootstrap's smallest p-value, times the number of comparisons, is above .05 from 26 on."""
    users, base = np.arange(300), np.random.default_rng(0).random(300)
    values = {f"system {place}": base - 0.5 * (place > 0) for place in range(31)}
    found = results.against_best(values, users)
    assert max(difference["p_holm"] for difference in found.values()) < 0.003


def write_ranks(run_dir: Path, ranks: dict[int, float], name: str = "test") -> Cell:
    """event → rank, stored in another order than that of the events; user = event // 2."""
    run_dir.mkdir(parents=True, exist_ok=True)
    events = sorted(ranks, reverse=True)
    table = {
        "task": ["rec"] * len(events),
        "user_id": [f"u{event // 2}" for event in events],
        "rank": [float(ranks[event]) for event in events],
        "num_tied": [1] * len(events),
        "event_id": events,
    }
    pq.write_table(pa.table(table), run_dir / f"evaluation-{name}.parquet")
    return Cell(run_dir.parent.name, run_dir.name, run_dir, run_dir, (), run_dir)


def compare_task(done: dict[str, list[Cell]], kind: str) -> tuple[int, dict[str, dict[str, Any]]]:
    values = {
        name: [results.event_values(cell.run_dir, kind) for cell in of_model]
        for name, of_model in done.items()
    }
    return results.compare_task(values, "rec")


def test_half_an_interval_that_ends_at_one_is_its_longer_side() -> None:
    assert value_cell({"value": 0.95, "low": 0.6, "high": 1.0}) == ".950 ± .350"
    assert value_cell({"value": 0.5, "low": 0.45, "high": 0.55}) == ".500 ± .050"
    assert value_cell({"value": 0.5, "low": None, "high": None}) == ".500"


def test_values_are_those_of_the_events_that_every_run_ranked(tmp_path: Path) -> None:
    done = {
        "sasrec": [
            write_ranks(tmp_path / "sasrec" / "seed-0", {0: 1, 1: 1, 2: 30}),
            write_ranks(tmp_path / "sasrec" / "seed-1", {0: 1, 1: 7, 2: 30}),
        ],
        "popularity": [write_ranks(tmp_path / "popularity" / "seed-0", {1: 7, 2: 7, 5: 1})],
        "gru4rec": [],
        "bm25": [write_ranks(tmp_path / "bm25" / "seed-0", {0: 1})],  # does not recommend
    }
    num_events, found = compare_task(done, "sampled")
    assert num_events == 2 and set(found) == {"sasrec", "popularity"}
    recall = found["sasrec"]["recall@5"]
    assert (
        recall["seeds"] == [0.5, 0.0]
        and recall["value"] == 0.25
        and (recall["low"], recall["high"]) == (0, 1)
    )
    assert found["popularity"]["recall@10"] == {"value": 1.0, "low": None, "high": None, "seeds": [1.0]}
    assert found["popularity"]["ndcg@10"]["value"] == pytest.approx(1 / 3)
    assert found["sasrec"]["against"]["model"] == "popularity"


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_a_cell_whose_files_are_damaged_is_named_and_the_rest_counts(
    data: Path, tmp_path: Path, ending: str
) -> None:
    request = Request(str(data), tmp_path, models=("popularity", "item_knn"), candidates=("sampled",))
    plan, made = make_plan(request), []
    for name in request.models:
        cell = write_ranks(request.runs_of(name) / "seed-0", {0: 1, 1: 7})
        protocol = {"candidates": "sampled", "num_negatives": 20, "candidates_per_s": 1.0}
        document = {"protocol": protocol, "rec": {"num_events": 2}}
        (cell.run_dir / "evaluation-test.json").write_text(json.dumps(document))
        (cell.run_dir / "status.json").write_text('{"status": "finished"}')
        (cell.run_dir / "metrics.jsonl").touch()
        (cell.run_dir / "config.yaml").write_text(to_yaml(plan.configs[name]))
        made.append(cell)
    whole = results.read_results(plan, made, {})
    assert [len(row["cells"]) for row in whole["rows"]] == [1, 1]
    (made[0].run_dir / f"evaluation-test.{ending}").write_text("half")
    rows = {row["model"]: row for row in results.read_results(plan, made, {})["rows"]}
    assert f"gensr evaluate {made[0].run_dir} --split" in rows["popularity"]["errors"]["popularity seed-0"]
    assert not rows["popularity"]["results"] and not rows["item_knn"]["errors"]
    assert rows["item_knn"]["results"]["sampled"]["rec"]["recall@5"]["value"] == 0.5


def test_a_file_without_ties_is_read(tmp_path: Path) -> None:
    cell = write_ranks(tmp_path / "sasrec" / "seed-0", {0: 1, 1: 7})
    path = cell.run_dir / "evaluation-test.parquet"
    with_ties = results.event_values(cell.run_dir, "sampled")["rec"]
    pq.write_table(pq.read_table(path).drop_columns(["num_tied"]), path)
    assert (results.event_values(cell.run_dir, "sampled")["rec"].metrics == with_ties.metrics).all()


def test_the_planted_optimum_is_a_row_where_it_ranked_the_same_events(tmp_path: Path) -> None:
    folder = PreparedFolder.at(make_tiny_folder(tmp_path / "data"))
    request = Request(str(folder.path), tmp_path / "out", models=("popularity",), candidates=("sampled",))
    plan = make_plan(request)
    num_events = {"sampled": {"rec": 20, "src": 10}}
    assert results.optimum_results(plan, num_events) == {}
    figures = dict.fromkeys(FIGURES, 0.75)
    report = {"split_fingerprint": folder.manifest.fingerprint, "src": {**figures, "num_events": 9}}
    (folder.path / "optimum.json").write_text(json.dumps({**report, "rec": {**figures, "num_events": 20}}))
    found = results.optimum_results(plan, num_events)
    assert set(found) == {"rec"}, "other events of search"
    assert found["rec"]["ndcg@10"] == {"value": 0.75, "low": None, "high": None, "seeds": [0.75]}
    (folder.path / "optimum.json").write_text(json.dumps({**report, "split_fingerprint": "another"}))
    assert results.optimum_results(plan, num_events) == {}


@pytest.mark.parametrize(
    ("source", "users", "items", "title"),
    [
        ("unisar", 68_223, 61_934, "Amazon Kindle Store"),
        ("unisar", 22_700, 673_414, "KuaiSAR"),
        ("kuaisar", 22_650, 670_000, "KuaiSAR"),
        ("unisar", 22_700, 61_934, ""),
        ("tables", 68_223, 61_934, ""),
    ],
)
def test_folders_of_the_same_data_have_the_published_numbers(
    source: str, users: int, items: int, title: str
) -> None:
    assert results.published_numbers(manifest(source, users, items))["title"] == title


def test_hard_ranks_are_compared_by_themselves(tmp_path: Path) -> None:
    done = {}
    for model, hard in (("sasrec", 3), ("popularity", 1)):
        write_ranks(tmp_path / model / "seed-0", {0: 1, 1: 1})
        done[model] = [write_ranks(tmp_path / model / "seed-0", {0: hard, 1: hard}, "test-hard")]
    found = {kind: compare_task(done, kind)[1] for kind in ("sampled", "hard")}
    mrr = {kind: {model: of[model]["mrr"]["value"] for model in of} for kind, of in found.items()}
    assert mrr["sampled"] == {"sasrec": 1.0, "popularity": 1.0}
    assert mrr["hard"] == {"sasrec": pytest.approx(1 / 3), "popularity": 1.0}
    assert found["hard"]["sasrec"]["against"]["model"] == "popularity"


def manifest(source: str, users: int, items: int) -> Any:
    return SimpleNamespace(num_users=users, num_items=items, source=source)


def test_published_numbers_where_the_data_set_is_the_papers() -> None:
    kindle = results.published_numbers(manifest("amazon", 68_000, 61_900))
    assert kindle["models"]["sasrec"]["rec"] == {
        "recall@5": 0.5295, "recall@10": 0.6772, "ndcg@5": 0.3747, "ndcg@10": 0.4225,
    }  # fmt: skip
    search = kindle["models"]["gensr"]["src"]
    assert search["recall@5"] < search["recall@10"] == 0.9853 and search["ndcg@5"] == 0.9664
    assert "recall@10 and ndcg@5 are swapped in the paper" in kindle["notes"][0]
    for title in ("Amazon Kindle Store", "KuaiSAR"):
        source, users, items = {"A": ("amazon", 68223, 61934), "K": ("kuaisar", 25877, 6890707)}[title[0]]
        for name, tasks in results.published_numbers(manifest(source, users, items))["models"].items():
            for task, numbers in tasks.items():
                assert numbers["recall@5"] < numbers["recall@10"], (title, name, task)
                assert numbers["ndcg@5"] < numbers["ndcg@10"], (title, name, task)
    assert results.published_numbers(manifest("amazon", 8_317, 4_344))["models"] == {}
    assert results.published_numbers(manifest("kuaisar", 1_000, 4_000))["title"] == ""


# ---- rendering ---------------------------------------------------------------------------------------------


def metrics_of(value: float, seeds: int) -> dict[str, Any]:
    ends = {"low": value - 0.02, "high": value + 0.02} if seeds > 1 else {"low": None, "high": None}
    return {name: {"value": value, **ends, "seeds": [value] * seeds} for name in FIGURES}


def row_of(model: str, title: str, value: float, seeds: int, **more: Any) -> dict[str, Any]:
    against = {"model": "sasrec", "difference": value - 0.4, "low": -0.1, "high": 0.1, "p": 0.01}
    tested = {**metrics_of(value, seeds), "against": {**against, "p_holm": 0.02}}
    took = {"train_s": 12.0, "score_s": {"sampled": 1.0}}
    cell = {
        "name": "seed-0",
        "run_dir": f"runs/{model}/seed-0",
        "step": 30,
        "best_step": 20,
        "best_value": value,
        "settings": {"optim.lr": 1e-3},
        "curve": [[10, value - 0.1], [20, value], [30, value - 0.02]],
        **took,
    }
    row = {"model": model, "title": title, "tasks": ["rec"], "trained": seeds > 1, "parameters": 1234, **took}
    row |= {"select_metric": "mean/ndcg@10", "tuning": {}, "cells": [cell] * seeds, "errors": {}}
    row |= {"note": "trained for 3 of the preset's 300 epochs, by --budget" if model == "sasrec" else ""}
    return {**row, "published": {}, "results": {"sampled": {"rec": tested}}, **more}


def made_up() -> dict[str, Any]:
    data = {"folder": "data/x", "source": "amazon", "users": 68_223, "items": 61_934, "num_negatives": 99}
    tuned = {"settings": {"optim.lr": 0.00123456}, "best_trial": 3, "trials": 5, "value": 0.4}
    failed = {"errors": {"gru4rec seed-0": "</script><b>| no memory"}, "cells": [], "results": {}}
    return {
        "data": data,
        "published": {"title": "Amazon Kindle Store", "notes": ["gensr, src: swapped"]},
        "seeds": 3,
        "trials": 5,
        "budget": {"minutes": 360.0, "longest_s": 742.0},
        "candidates": ["sampled"],
        "num_events": {"sampled": {"rec": 1000, "src": 0}},
        "metrics": list(FIGURES),
        "tested": "ndcg@10",
        "rows": [
            row_of(
                "popularity", "popularity", 0.1234, 1, beams="sampled: 20 beams reach .200 of the candidates"
            ),
            row_of("sasrec", "SASRec", 0.4, 3, tuning=tuned, published={"rec": {"ndcg@10": 0.4226}}),
            row_of("gru4rec", "GRU4Rec", 0.2, 3, **failed),
        ],
    }


def test_markdown_has_intervals_failures_tuned_settings_and_notes() -> None:
    lines = markdown(made_up())
    first, second = (line for line in lines if line.startswith(("| SASRec", "| popularity")))
    assert first.startswith("| SASRec | .400 ± .020 |") and "| .423 |" in first
    assert second.startswith("| popularity | .123 | .123 |") and "-.277 (p .020)" in second
    assert "- popularity: sampled: 20 beams reach .200 of the candidates" in lines
    assert "- gru4rec seed-0: &lt;/script>&lt;b>\\| no memory" in lines
    start = lines.index("## Cut by --budget 360: no run trains longer than 12.4 minutes")
    assert lines[start + 2] == "- SASRec: trained for 3 of the preset's 300 epochs, by --budget"
    assert "- SASRec: optim.lr 0.00123" in lines and "Published numbers: gensr, src: swapped." in lines


def test_hard_candidates_have_tables_of_their_own() -> None:
    document = made_up()
    document["candidates"] = ["sampled", "hard"]
    document["num_events"]["hard"] = {"rec": 900, "src": 0}
    for row in document["rows"]:
        row["score_s"]["hard"] = 2.0
        if row["results"]:
            row["results"]["hard"] = {"rec": metrics_of(0.25, 1)}
    lines = markdown(document)
    start = lines.index("## Recommendation, hard candidates (900 events)")
    block = lines[start : lines.index("## Failed")]
    assert [line for line in block if line.startswith("| SASRec | .250 |")]
    assert "published" not in "".join(block), "the paper ranked among sampled candidates"
    found = [line for line in csv.DictReader(io.StringIO(csv_text(document))) if line["candidates"] == "hard"]
    assert {(line["model"], line["published"], line["num_events"]) for line in found} == {
        ("sasrec", "", "900"), ("popularity", "", "900"),
    }  # fmt: skip
    assert 'hard: "hard candidates"' in html(document)


def test_a_system_that_decodes_says_what_its_beams_reach(tmp_path: Path) -> None:
    cell = write_ranks(tmp_path / "idgenrec" / "seed-0", {0: 1})
    for kind, name, beams in (
        ("sampled", "test", 20),
        ("hard", "test-hard", None),
        ("full", "test-full", 50),
    ):
        reached = {} if beams is None else {"share_reached": beams / 100}
        protocol = {"candidates": kind} | ({} if beams is None else {"num_beams": beams})
        document = {"protocol": protocol, "rec": {"num_events": 1, **reached}}
        (cell.run_dir / f"evaluation-{name}.json").write_text(json.dumps(document))
    found = results._beams(
        {kind: read_evaluation(cell.run_dir, "test", kind) for kind in ("sampled", "hard", "full")}
    )
    assert found == (
        "sampled: 20 beams reach .200 of the candidates; full: 50 beams reach .500 of the candidates"
    )
    assert results._beams({}) == ""


def test_csv_has_a_line_for_each_metric() -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(made_up()))))
    assert len(lines) == 2 * len(FIGURES)
    tested = [line for line in lines if line["metric"] == "ndcg@10"]
    assert [line["model"] for line in tested] == ["sasrec", "popularity"] and tested[1]["low"] == ""
    assert (
        tested[0]["published"] == "0.4226" and tested[0]["p_holm"] == "0.02" and tested[0]["num_seeds"] == "3"
    )
    assert all(line["p_holm"] == "" for line in lines if line["metric"] != "ndcg@10")


def test_the_page_is_one_file_that_no_data_can_break_out_of() -> None:
    page = html(made_up())
    assert "__DOCUMENT__" not in page and page.count("</script>") == 2
    text = page.split('type="application/json">')[1].split("</script>")[0]
    assert json.loads(text) == made_up()
    assert not any(word in page for word in ("src=", "href=", "@import", "fetch("))


# ---- SLURM -------------------------------------------------------------------------------------------------


def test_missing_cells_become_arrays(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def check(preset: str, words: list[str], machines: Any) -> tuple[None, list[str]]:
        checked.append(preset)
        return None, []

    monkeypatch.setattr(jobs, "checked", check)
    monkeypatch.setattr(jobs, "job_state", lambda folder: "")
    request = Request(str(data), tmp_path, models=("popularity", "sasrec"), seeds=2, max_steps=2)
    run_dir = tmp_path / "runs" / "popularity" / "seed-0"
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text('{"status": "finished"}')
    for name in ("test.json", "test.parquet", "test-full.json", "test-full.parquet"):
        (run_dir / f"evaluation-{name}").write_text("{}")
    plan = make_plan(request)
    made = plan_submission(plan, jobs.Machines(gpus_per_node=0), "gensr table")
    train, *evaluations = made.jobs
    assert [job.path.name for job in evaluations] == ["evaluate-sampled.sbatch", "evaluate-full.sbatch"]
    assert "#SBATCH --array=0-1" in train.text and "popularity" not in train.text
    settings = tmp_path / "settings" / "sasrec.yaml"
    words = f"run.dir={tmp_path}/runs/sasrec/seed-1 tracking.run_name=sasrec-seed-1 run.seed=1"
    assert f"  1) set -- {settings} {words} ;;" in train.text
    assert "--candidates full --events 2000 --no-baselines" in evaluations[1].text
    assert all("--dependency=aftercorr:7" in job.command(["7"]) for job in evaluations)
    assert checked == [str(settings)] and (tmp_path / "logs").is_dir()
    monkeypatch.setattr(jobs, "job_state", lambda folder: "12 is PENDING")
    with pytest.raises(RunError, match="has a job already: 12 is PENDING"):
        plan_submission(plan, jobs.Machines(), "gensr table")


def test_stages_are_submitted_before_the_cells(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[list[str]] = []

    def check(preset: str, words: list[str], machines: Any) -> tuple[None, list[str]]:
        checked.append(words)
        return None, []

    monkeypatch.setattr(jobs, "checked", check)
    monkeypatch.setattr(jobs, "job_state", lambda folder: "")
    request = Request(str(data), tmp_path, models=("sasrec", "collm"), seeds=2, candidates=("sampled",))
    done = tmp_path / "runs" / "collm" / "seed-0-stage-1"
    done.mkdir(parents=True)
    (done / "status.json").write_text('{"status": "finished"}')
    made = plan_submission(make_plan(request), jobs.Machines(gpus_per_node=0), "gensr table").jobs
    names = ["train-stage-1.sbatch", "train.sbatch", "evaluate-sampled.sbatch"]
    assert [job.path.name for job in made] == names
    assert [job.after for job in made] == ["", "afterany:{0}", "aftercorr:{1}"]
    assert "#SBATCH --array=0-0" in made[0].text and "seed-1-stage-1" in made[0].text
    assert "#SBATCH --array=0-3" in made[1].text and f"run.init_from={done}" in made[1].text
    assert [words[-2] for words in checked if "model.stage=text" in words] == ["model.stage=text"]


def test_hard_candidates_are_submitted_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "checked", lambda preset, words, machines: (None, []))
    monkeypatch.setattr(jobs, "job_state", lambda folder: "")
    folder, kinds = with_hard_candidates(data, tmp_path / "data"), ("sampled", "hard")
    request = Request(str(folder), tmp_path / "out", models=("popularity",), candidates=kinds)
    made = plan_submission(make_plan(request), jobs.Machines(gpus_per_node=0), "gensr table")
    assert [job.path.name for job in made.jobs[1:]] == ["evaluate-sampled.sbatch", "evaluate-hard.sbatch"]
    assert "--candidates hard" in made.jobs[2].text


def test_systems_are_tuned_before_they_are_submitted(data: Path, tmp_path: Path) -> None:
    plan = make_plan(Request(str(data), tmp_path, models=("sasrec",), trials=2))
    with pytest.raises(ConfigError, match="sasrec is still to be tuned"):
        plan_submission(plan, jobs.Machines(), "gensr table")
