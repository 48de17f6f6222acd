"""gensr report: a run's page from its files and its model, and the page in a real browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.integration.test_page import CHROMIUM, LOW_CONTRAST
from tests.runs import make_run
from trainer.analysis.report import write_report
from trainer.analysis.report.asked import _ask
from trainer.cli import app
from trainer.config import DataConfig
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.evaluation.baselines import build_baseline
from trainer.evaluation.ranking import rank_events
from trainer.evaluation.sampled import evaluate_run

pytestmark = pytest.mark.slow
NUM_EVENTS = 24


@pytest.fixture(scope="module")
def run_dir(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("reported"), prepared, "model.backbone=scratch:nano")
    evaluate_run(run)
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "loss": 1 / step, "lr": 0.001, "events_per_s": 100.0}
        for step in range(1, 9)
    ]
    records += [
        {"kind": "valid", "step": step, "rec/ndcg@10": 0.1 * step, "src/ndcg@10": 0.05 * step}
        for step in (4, 8)
    ]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    progress = {"step": 8, "best_step": 8, "train_s": 61.0}
    (run / "status.json").write_text(json.dumps({"status": "finished", "progress": progress}))
    done = CliRunner().invoke(app, ["report", str(run), "--events", str(NUM_EVENTS)])
    assert done.exit_code == 0, done.output
    return run


def test_numbers_are_those_of_the_evaluation(run_dir: Path) -> None:
    text = (run_dir / "report" / "report.html").read_text()
    evaluation = json.loads((run_dir / "evaluation-test.json").read_text())
    for task in ("rec", "src"):
        for metric in ("recall@5", "ndcg@10"):
            low, high = evaluation[task]["ci95"][metric]
            numbers = [
                f"{number:.3f}".replace("0.", ".", 1) for number in (evaluation[task][metric], low, high)
            ]
            assert "{} [{}, {}]".format(*numbers) in text
    asked = json.loads((run_dir / "report" / "asked.json").read_text())
    for task in ("rec", "src"):
        assert asked[task]["num_events"] == NUM_EVENTS
        assert asked[task]["reliability"]["num_pairs"] == NUM_EVENTS * (1 + asked[task]["num_negatives"])
        best, worst = asked[task]["best"], asked[task]["worst"]
        assert [one["rank"] for one in best] == sorted(one["rank"] for one in best)
        assert best[0]["rank"] <= worst[-1]["rank"] <= worst[0]["rank"]
        weights = [read["weights"] for one in best + worst for read in one["history"]]
        assert weights and all(set(found) == {"cf", "semantic"} for found in weights)
        assert f"{best[0]['rank']:g} of {best[0]['num_candidates']}" in text


def test_the_rank_of_an_answer_counts_ties_as_its_evaluation_does(prepared: Path) -> None:
    """BM25 scores 0 for all items without the query's words: the clicked one is not the first of these."""
    folder = PreparedFolder.at(prepared)
    model = build_baseline("bm25", folder)
    stream = EvalStream(folder, "test", DataConfig(history_max=5), 64, tasks=model.tasks)
    ranks = rank_events(model.score, stream)
    assert (ranks.num_tied[ranks.rank == ranks.rank.max()] > 1).all()
    asked = _ask(model, folder, stream, num_negatives=4)
    assert [one.rank for one in asked.worst] == sorted(ranks.rank, reverse=True)[: len(asked.worst)]
    assert asked.reliability is None  # a share of words is no P(click)


def test_every_picture_is_png_and_svg(run_dir: Path) -> None:
    names = {path.stem for path in (run_dir / "report").glob("*.svg")}
    assert names == {path.stem for path in (run_dir / "report").glob("*.png")}
    wanted = {"results-test-rec", "results-test-src", "validation-rec", "validation-src", "losses", "speed"}
    assert wanted | {"calibration", "segment-history-length"} <= names


def test_a_run_whose_data_is_gone_says_so(run_dir: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run_dir, alone)
    config = (
        (alone / "config.yaml").read_text().replace(str(run_dir.parents[1] / "data"), str(tmp_path / "x"))
    )
    (alone / "config.yaml").write_text(config)
    text = write_report(alone, NUM_EVENTS).read_text()
    assert "Left out" in text and "Results, test split" in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(run_dir: Path, browser: Any, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    problems: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto((run_dir / "report" / "report.html").as_uri())
    assert not [url for url in asked if not url.startswith(("file:", "data:"))] and not problems
    broken = "() => [...document.images].filter((one) => !one.naturalWidth || !one.alt).length"
    assert page.locator("img").count() >= 8 and page.evaluate(broken) == 0
    assert not page.evaluate(LOW_CONTRAST)
    wide = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) <= 0  # tables scroll in their own boxes
    page.locator("nav a", has_text="Calibration").click()
    assert page.locator("h2", has_text="Calibration").is_visible()
    page.locator("summary", has_text="Configuration").click()
    assert "model.backbone" in page.locator("details[open] pre").first.inner_text()
    page.close()
