"""gensr paper: its plan by hand, its resume, its page. Runs are made by a stand-in, so nothing is trained."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trainer.experiments.analyses.separability as separability_experiment
import trainer.experiments.paper.run as paper_run
import trainer.experiments.table.run as table_run
from data_shards.settings import read_yaml
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError
from trainer.experiments import cells
from trainer.experiments.cells import Cell
from trainer.experiments.costs import Machine, Size
from trainer.experiments.paper.budget import LEVELS, WHOLE
from trainer.experiments.paper.finished import FinishedTable
from trainer.experiments.paper.page import _what_was_run, paper_cell
from trainer.experiments.paper.plan import PaperRequest, dry_run, keep, make_plan, parts_of, seconds_of
from trainer.experiments.table import Request, make_table

KINDS = ("sampled",)
SIZE = Size.of_halves(54_000, 3_900, items=4_000)


def request(out: Path, **changes: Any) -> PaperRequest:
    return replace(PaperRequest("demo", out), **changes)


# ---- budget and plan ---------------------------------------------------------------------------------------


def test_more_minutes_buy_more_and_fit(tmp_path: Path) -> None:
    before = 0
    for minutes in (1, 30, 80, 600):
        plan = make_plan(request(tmp_path, budget=str(minutes)), SIZE)
        number = sum(count for _, count, _ in parts_of(plan, SIZE))
        assert number >= before and (minutes == 1 or seconds_of(plan, SIZE) <= 60 * minutes)
        before = number
    assert plan.budget in LEVELS and plan.budget.trust
    assert make_plan(request(tmp_path, budget="paper")).budget == WHOLE
    assert {"bsr", "copps", "gensr"} <= set(make_plan(request(tmp_path, budget="paper")).systems)


def test_the_demo_fits_ninety_minutes_on_two_cores(tmp_path: Path) -> None:
    plan = make_plan(request(tmp_path), SIZE)
    seconds = sum(found for *_, found in parts_of(plan, SIZE, Machine(cores=2, gpus=0)))
    assert seconds <= 80 * 60
    assert {variant.analysis for variant in plan.variants} == {"ablations", "transfer", "sensitivity"}


def test_variants_differ_from_the_preset_and_none_is_made_twice(tmp_path: Path) -> None:
    plan = make_plan(request(tmp_path, budget="paper"))
    words = [variant.overrides for variant in plan.variants]
    assert len(set(words)) == len(words) == 8 + 2 + 4 * 3 - 1 - 1  # λ = 0 is an ablation, too
    assert ("model.prompt=paper",) in words and ("model.temperature=0.05",) in words
    assert not any("model.temperature=0.07" in one for one in words)  # the preset's own
    names = [cell.run_dir for cell in plan.cells()]
    assert len(set(names)) == len(names) == WHOLE.variant_seeds * len(words)


def test_a_small_budget_trains_no_system_longer_than_gensr(tmp_path: Path) -> None:
    """Equal epochs would leave those that are fast and have hundreds of epochs untrained."""
    plan = make_plan(request(tmp_path, name="scientific", budget="120"), SIZE)
    assert (plan.budget.epochs and "sasrec" not in plan.epochs) or plan.epochs["sasrec"] > 1
    longest = plan.epochs["gensr"]
    assert longest == pytest.approx(plan.budget.epochs, rel=0.01) and plan.epochs["unisar"] > 0
    words = plan.table.own_overrides["unisar"]
    assert f"run.max_epochs={plan.epochs['unisar']:g}" in words and "optim.global_batch_size=64" in words
    assert "popularity" not in plan.epochs  # counted

    kept = keep(plan)
    assert keep(make_plan(request(tmp_path, name="scientific", budget="120"), SIZE)).epochs == kept.epochs


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    for wrong, said in (({"budget": "much"}, "minutes or paper"), ({"name": "mars"}, "there is no mars")):
        with pytest.raises(ConfigError, match=said):
            make_plan(request(tmp_path, **wrong), SIZE)
    with pytest.raises(ConfigError, match="give the folder of raw files with --raw"):
        paper_run.prepare_data(PaperRequest("scientific", tmp_path), lambda line: None)


def test_the_time_in_training_counts_trials(tmp_path: Path) -> None:
    plan = make_plan(request(tmp_path, budget="30"), SIZE)
    trial = plan.table.runs_of(plan.systems[0]) / "trial-0"
    trial.mkdir(parents=True)
    (trial / "status.json").write_text('{"status": "finished", "progress": {"train_s": 7200.0}}')
    facts = _what_was_run(plan, {"rows": [], "gensr_version": "1"}).parts[0].rows  # type: ignore[union-attr]
    assert ["time in training", "2.00 hours"] in facts


def test_an_analysis_whose_document_is_gone_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(request(tmp_path, budget="30"), SIZE)
    document, made = plan.request.analyses / "separability.json", []

    def analyse(what: str, runs: Sequence[Path], out: Path, *others: Any) -> None:
        made.append(what)
        document.write_text("{}")

    monkeypatch.setattr(paper_run, "runs_of", lambda plan: {"separability": []})
    monkeypatch.setattr(paper_run, "analyse", analyse)
    monkeypatch.setattr(paper_run, "load_section", lambda what, out: document.is_file() or None)
    plan.request.analyses.mkdir(parents=True)
    for _ in range(2):
        paper_run.run_analyses(plan, {}, lambda line: None)
    assert len(made) == 1
    document.unlink()
    paper_run.run_analyses(plan, {}, lambda line: None)
    assert len(made) == 2


def test_a_begun_evaluation_keeps_its_plan(tmp_path: Path) -> None:
    begun = keep(make_plan(request(tmp_path, budget="30"), SIZE))
    # the machine or the data's size seems other now: the same command goes on with the same plan
    again = keep(make_plan(request(tmp_path, budget="30"), Size.of_halves(10, 10, 10)))
    assert again == begun
    assert keep(make_plan(request(tmp_path, budget="30", jobs=2), SIZE)).budget == begun.budget
    with pytest.raises(ConfigError, match="was begun with"):
        keep(make_plan(request(tmp_path, budget="60"), SIZE))


def test_hours_count_threads_and_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.experiments.pool.num_cores", lambda: 8)
    monkeypatch.setattr("trainer.runtime.launch.num_cores", lambda: 8)
    monkeypatch.setattr("trainer.runtime.device.has_gpu", lambda: False)
    asked = request(tmp_path, budget="paper", overrides=("run.threads=1",))
    found = {jobs: dry_run(replace(asked, jobs=jobs)) for jobs in (1, 2, 8)}
    assert found[1]["parts"] == found[2]["parts"], "with one thread a run takes as long beside others"
    assert found[1]["seconds"] == pytest.approx(sum(part["seconds"] for part in found[1]["parts"]))
    speedup = {jobs: found[1]["seconds"] / found[jobs]["seconds"] for jobs in (2, 8)}
    longest_chain = "the trials of a system wait for one another"
    assert 1.3 < speedup[2] < 2 and speedup[2] < speedup[8] < 8, longest_chain
    assert "on 1 CPU core each, 8 at once" in found[8]["lines"][0]
    all_cores = dry_run(replace(asked, overrides=()))
    assert all_cores["seconds"] < found[1]["seconds"] and "on 8 CPU cores," in all_cores["lines"][0]
    threads = ("run.threads=1",)
    few, many = (
        make_plan(request(tmp_path, budget="100", jobs=jobs, overrides=threads), SIZE) for jobs in (1, 8)
    )
    assert LEVELS.index(many.budget) < LEVELS.index(few.budget), "the same minutes buy more"
    with pytest.raises(ConfigError, match="Give --jobs 8"):
        dry_run(replace(asked, jobs=9))


def test_the_dry_run_writes_nothing(tmp_path: Path) -> None:
    found = dry_run(request(tmp_path / "out"))
    assert found["runs"] == sum(part["runs"] for part in found["parts"]) and found["disk_gb"] > 0
    assert not (tmp_path / "out").exists()


def test_published_numbers_are_marked_beyond_the_interval() -> None:
    with_interval = {"value": 0.5, "low": 0.45, "high": 0.55}
    assert paper_cell(with_interval, 0.54) == ".540" and paper_cell(with_interval, 0.56) == "!.560"
    one_seed = {"value": 0.5, "low": None, "high": None}
    assert paper_cell(one_seed, 0.505) == ".505" and paper_cell(one_seed, 0.52) == "!.520"
    assert paper_cell(one_seed, None) == ""


# ---- the story ---------------------------------------------------------------------------------------------


class StandIn:
    """Makes run folders as gensr train and gensr evaluate would, with ranks that follow from the name."""

    def __init__(self, folder: PreparedFolder) -> None:
        self.folder = folder
        self.made: list[str] = []
        self.stop_at = ""
        self.fail_at = ""

    def train(self, cell: Cell) -> None:
        if cell.title == self.stop_at:
            raise KeyboardInterrupt
        if self.fail_at and self.fail_at in cell.title:
            raise ConfigError("out of luck")
        self.made.append(cell.title)
        cell.run_dir.mkdir(parents=True, exist_ok=True)
        text = read_yaml(cell.settings_file)
        for word in (f"run.dir={cell.run_dir}", *cell.overrides):
            key, _, value = word.partition("=")
            section, _, name = key.partition(".")
            text[section][name] = json.loads(value) if value[:1].isdigit() or value == "false" else value
        (cell.run_dir / "config.yaml").write_text(json.dumps(text))
        status = {"status": "finished", "progress": {"step": 5, "train_s": 2.0}}
        (cell.run_dir / "status.json").write_text(json.dumps(status))
        (cell.run_dir / "metrics.jsonl").write_text('{"kind": "valid", "step": 5, "mean/ndcg@10": 0.1}\n')

    def evaluate(self, cell: Cell, candidates: Sequence[str], events: int) -> None:
        columns = self.folder.columns("test", ["event_id", "task", "user"])
        generator = np.random.default_rng(len(cell.title))
        number = len(columns["task"])
        table = pa.table(
            {
                "task": np.array(["rec", "src"])[columns["task"]],
                "user_id": [f"u{user}" for user in columns["user"]],
                "item_id": ["i1"] * number,
                "rank": 1.0 + generator.integers(0, 20, number),
                "num_tied": np.ones(number, np.int64),
                "event_id": columns["event_id"],
            }
        )
        protocol = {
            "candidates": "sampled",
            "num_negatives": 99,
            "split": "test",
            "manifest_hash": self.folder.manifest.hash,
            "split_fingerprint": self.folder.manifest.fingerprint,
            "candidates_per_s": 100.0,
        }
        counts = {
            task: {"num_events": int((columns["task"] == n).sum())} for n, task in ((0, "rec"), (1, "src"))
        }
        pq.write_table(table, cell.run_dir / "evaluation-test.parquet")
        document = {"protocol": protocol, **counts}
        (cell.run_dir / "evaluation-test.json").write_text(json.dumps(document))


@pytest.fixture
def stand_in(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    shutil.copytree(prepared, tmp_path / "data")
    (tmp_path / "data" / "cf").mkdir(exist_ok=True)
    (tmp_path / "data" / "cf" / "lightgcn.safetensors").touch()
    made = StandIn(PreparedFolder.at(tmp_path / "data"))
    monkeypatch.setattr(table_run, "train_cell", made.train)  # of a trial
    monkeypatch.setattr(cells, "train_cell", made.train)
    monkeypatch.setattr(cells, "evaluate_cell", made.evaluate)
    monkeypatch.setattr(table_run, "_parent_run", lambda *arguments: "")
    real = paper_run.analyse

    def analyse(what: str, *arguments: Any) -> Any:  # no model is at hand to be asked
        if what in ("mutual-information", "space", "gradients"):
            raise ConfigError(f"{what}: no weights here")
        return real(what, *arguments)

    monkeypatch.setattr(paper_run, "analyse", analyse)
    few = partial(separability_experiment.separability, sample_sizes=(30, 100), num_repeats=2)
    monkeypatch.setattr(separability_experiment, "separability", few)
    return made


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(stand_in: StandIn, tmp_path: Path) -> None:
    asked = request(tmp_path / "out", data=tmp_path / "data", budget="4")
    plan = make_plan(asked, paper_run.size_of_data(asked))
    cells = plan.cells()
    stand_in.stop_at = cells[2].title
    with pytest.raises(KeyboardInterrupt):
        paper_run.make_paper(asked, lambda line: None)
    first = list(stand_in.made)
    assert f"{plan.cells()[1].title}" in first and not (tmp_path / "out" / "report.html").exists()

    stand_in.stop_at, stand_in.made = "", []
    stand_in.fail_at = cells[-1].title
    page = paper_run.make_paper(asked, lambda line: None)
    assert not set(first) & set(stand_in.made), "a finished run was made again"
    assert len(first) + len(stand_in.made) + 1 == sum(
        len(plan.table.seeds_of(name)) for name in plan.systems
    ) + len(cells)
    text = page.read_text()
    for part in (
        "(Table 2)",
        "(Table 3)",
        "Ablations (Figure 4)",
        "Lemma 5.1",
        "out of luck",
        "no weights here",
    ):
        assert part in text, part

    stand_in.fail_at, stand_in.made = "", []
    analysed = (tmp_path / "out" / "analyses" / "separability.json").stat().st_mtime_ns
    paper_run.make_paper(asked, lambda line: None)
    assert stand_in.made == [cells[-1].title]
    assert (tmp_path / "out" / "analyses" / "separability.json").stat().st_mtime_ns == analysed
    assert "out of luck" not in page.read_text()

    check_numbers(page, tmp_path / "out")


@pytest.mark.slow
def test_a_table_that_is_there_is_taken(stand_in: StandIn, tmp_path: Path) -> None:
    """Its systems, seeds and GenSR's settings; only variants are trained."""
    table = Request(
        str(tmp_path / "data"),
        tmp_path / "table",
        ("popularity", "gensr"),
        2,
        candidates=KINDS,
        presets={"gensr": "demo"},
    )
    asked = request(tmp_path / "out", finished=FinishedTable(table.out), budget="600")
    with pytest.raises(ConfigError, match=r"holds no table.json[.] Make it with: gensr table"):
        make_plan(asked)
    make_table(replace(table, own_overrides={"gensr": ("model.temperature=0.2",)}))
    document = json.loads((table.out / "table.json").read_text())
    document["rows"][1]["note"] = "trained for 1 of the preset's 3 epochs, by --budget"
    (table.out / "table.json").write_text(json.dumps(document))

    asked = request(tmp_path / "out", finished=FinishedTable(table.out), budget="600")
    plan = make_plan(asked, SIZE)
    assert plan.systems == ("popularity", "gensr") and plan.budget.seeds == 2 and not plan.epochs
    assert all(title.startswith("GenSR") for title, *_ in parts_of(plan, SIZE))
    assert all(cell.settings_file == table.settings_file("gensr") for cell in plan.cells())
    names = {variant.name for variant in plan.variants}
    assert "temperature-0.1" in names and "temperature-0.2" not in names  # the table's GenSR has 0.2

    stand_in.made = []
    page = paper_run.make_paper(asked, lambda line: None)
    assert sorted(stand_in.made) == sorted(cell.title for cell in plan.cells())
    assert "cut 1 of 1 trained systems short" in page.read_text()
    check_numbers(page, tmp_path / "out")
    ablations = json.loads((tmp_path / "out" / "analyses" / "ablations.json").read_text())
    assert {row["label"] for row in ablations["rows"]} >= {"without CF view", "as it is"}

    with pytest.raises(ConfigError, match=r"leave out optim\.lr=1"):
        make_plan(replace(asked, overrides=("optim.lr=1",)))
    with pytest.raises(ConfigError, match="was begun with"):
        keep(make_plan(request(tmp_path / "out", budget="600"), SIZE))
    document["data"]["manifest_hash"] = "0" * 64
    (table.out / "table.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"is one of .*data \(manifest .* not of .*/data"):
        paper_run.prepare_data(request(tmp_path, finished=FinishedTable(table.out)), lambda line: None)


def check_numbers(page: Path, out: Path) -> None:
    """Numbers of the page are those of the files."""
    text = page.read_text()
    table = json.loads((out / "table" / "table.json").read_text())
    for row in table["rows"]:
        for result in row["results"]["sampled"].values():
            assert f"{result['ndcg@10']['value']:.3f}".lstrip("0") in text
    ablations = json.loads((out / "analyses" / "ablations.json").read_text())
    for row in ablations["rows"]:
        assert escape(row["label"], quote=True) in text
