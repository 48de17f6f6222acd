"""gensr analyse against numbers that are known: by hand, or from the runs' own evaluations."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from tests.runs import make_run
from trainer.analysis.pages import Table
from trainer.analysis.vectors import load_vectors, vectors_of
from trainer.cli import app
from trainer.config import DataConfig
from trainer.data import EvalStream
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, DataError, RunError
from trainer.experiments.analyses import Options, analyse, gradients, load_section, sensitivity
from trainer.experiments.analyses.ablations import label, labels
from trainer.experiments.analyses.gradients import block_of
from trainer.experiments.analyses.groups import grouped
from trainer.experiments.analyses.mutual_information import answer_information
from trainer.experiments.analyses.options import titled
from trainer.models.contract import clicked_only
from trainer.models.gensr.model import GenSR
from trainer.runs.weights import load_run_model

NUM_EVENTS = 60


@pytest.fixture(scope="module")
def run_dir(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("analysed"), prepared, "model.backbone=scratch:nano")


# ---- vectors -----------------------------------------------------------------------------------------------


def test_hidden_states_give_the_scores(run_dir: Path) -> None:
    """What representations() calls hidden is what the answer is read from."""
    model, config, folder = load_run_model(run_dir)
    assert isinstance(model, GenSR)
    batch = next(iter(EvalStream(folder, "test", config.data, 16)))
    with torch.no_grad():
        hidden = model.representations(batch)["hidden"]
        logits = model.backbone.answer_rows(hidden, model.get_buffer("answer_tokens"))
        scores = model(model.prepare(clicked_only(batch)), mode="score")[:, 0]
    torch.testing.assert_close(logits[:, 0] - logits[:, 1], scores, atol=1e-5, rtol=1e-4)


def test_each_event_comes_with_its_item_and_a_negative(run_dir: Path) -> None:
    model, config, folder = load_run_model(run_dir)
    assert isinstance(model, GenSR)
    found = vectors_of(model, folder, config.data, num_events=NUM_EVENTS)
    assert found.recorded == "" and found.tasks == ["rec", "src"]
    for task in found.tasks:
        clicked, other = found.of(task, 1), found.of(task, 0)
        assert (clicked.event_id == other.event_id).all() and len(clicked.event_id) <= NUM_EVENTS
        assert not np.allclose(clicked.score, other.score)
    assert found.history.shape[1] * 2 + model.backbone.width == found.input.shape[1]
    np.testing.assert_allclose(found.probability, 1 / (1 + np.exp(-found.score)), rtol=1e-5)


def test_a_model_that_shows_nothing_is_recorded(prepared: Path) -> None:
    from trainer.configs import load_config
    from trainer.models.zoo import model_class
    from trainer.runs.weights import build_model

    folder, data = PreparedFolder.at(prepared), DataConfig(history_max=5)
    for name, layer in (("sasrec", True), ("popularity", False)):
        config = load_config(None, [f"model.name={name}", "data.history_max=5"])
        model = build_model(config, folder, folder.tables(model_class(name).needs)).eval()
        if layer:
            found = vectors_of(model, folder, data, num_events=20)
            assert found.recorded and found.hidden.shape == found.input.shape
            assert found.hidden.shape[1] == config.model.dim  # type: ignore[attr-defined]
        else:
            with pytest.raises(DataError, match="no layer"):
                vectors_of(model, folder, data, num_events=20)


# ---- mutual information ------------------------------------------------------------------------------------


def test_information_of_answers_that_are_known() -> None:
    users = np.arange(4000)
    sure = answer_information(np.repeat([0.0, 1.0], 2000), users)
    assert sure.value == pytest.approx(np.log(2), abs=1e-6)
    nothing = answer_information(np.full(4000, 0.3), users)
    assert nothing.value == pytest.approx(0, abs=1e-9)
    half = answer_information(np.repeat([0.0, 0.0, 0.0, 0.8], 1000), users)  # E[p] = .2, H(.2) = H(.8)
    by_hand = -0.75 * (0.2 * np.log(0.2) + 0.8 * np.log(0.8))
    assert half.value == pytest.approx(by_hand, abs=1e-6) and half.low <= half.value <= half.high


def test_too_few_users_are_told_before_anything_is_computed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.analysis.vectors.vectors_of", None)
    told = r"^\d users among 9 rec events; at least 100 needed: raise --events$"
    with pytest.raises(DataError, match=told):
        load_vectors(run_dir, num_events=9, min_users=100)
    with pytest.raises(DataError, match=r"at least 100 needed: the test split has no more$"):
        load_vectors(run_dir, min_users=100)


# ---- gradients ---------------------------------------------------------------------------------------------


def test_blocks_of_parameters() -> None:
    assert block_of("backbone.model.encoder.block.0.layer.1.wo.weight") == "backbone.model.encoder.block.0"
    assert block_of("cf_filter.query.weight") == "cf_filter.query"
    assert block_of("no_query") == "no_query"


# ---- groups of runs ----------------------------------------------------------------------------------------


def copies(run_dir: Path, out: Path, *settings: dict[str, Any]) -> list[Path]:
    """Run folders with an evaluation each: ranks that get worse by `worse` places, noise by seed."""
    base = (run_dir / "config.yaml").read_text()
    import yaml

    made = []
    for number, changes in enumerate(settings):
        tree = yaml.safe_load(base)
        worse = changes.pop("worse", 0)
        for key, value in changes.items():
            section, name = key.split(".")
            tree[section][name] = value
        folder = out / f"run-{number}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        generator = np.random.default_rng(tree["run"]["seed"])
        ranks = 1.0 + worse + generator.integers(0, 3, 200)
        table = pa.table(
            {
                "task": ["rec"] * 100 + ["src"] * 100,
                "user_id": [f"u{place % 50}" for place in range(200)],
                "item_id": ["i1"] * 200,
                "rank": ranks,
                "num_tied": np.ones(200, np.int64),
                "event_id": np.arange(200),
            }
        )
        pq.write_table(table, folder / "evaluation-test.parquet")
        protocol = {
            "candidates": "sampled",
            "num_negatives": 20,
            "manifest_hash": "m",
            "split_fingerprint": "s",
            "split": "test",
        }
        document = {"protocol": protocol, "rec": {"num_events": 100}, "src": {"num_events": 100}}
        (folder / "evaluation-test.json").write_text(json.dumps(document))
        made.append(folder)
    return made


def test_ablations_group_seeds_and_test_differences(run_dir: Path, tmp_path: Path) -> None:
    seeds = [{"run.seed": seed} for seed in range(3)]
    worse = [{"run.seed": seed, "model.soft_filter": False, "worse": 3} for seed in range(3)]
    runs = copies(run_dir, tmp_path, *seeds, *worse)
    document = analyse("ablations", runs, tmp_path / "out")
    full, without = document["rows"]
    assert (full["label"], without["label"]) == ("as it is", "without soft filter")
    assert full["tasks"]["rec"]["against"] == {}
    for task in ("rec", "src"):
        values = full["tasks"][task]["ndcg@10"]
        assert len(values["seeds"]) == 3 and values["interval"] == "seeds"
        against = without["tasks"][task]["against"]
        difference = without["tasks"][task]["ndcg@10"]["value"] - values["value"]
        assert against["difference"] == pytest.approx(difference) and difference < -0.1
        assert against["p_holm"] < 0.01 and against["low"] < against["difference"] < against["high"] < 0
    for name in ("ablations.json", "ablations.html", "ablations.png", "ablations.svg"):
        assert (tmp_path / "out" / name).is_file()
    section = load_section("ablations", tmp_path / "out")
    assert section is not None and section.title.startswith("Ablations")
    assert load_section("transfer", tmp_path / "out") is None


def test_seeds_of_two_stages_are_one_group(run_dir: Path, tmp_path: Path) -> None:
    """A second stage begins with the first one of its own seed, so run.init_from differs as the seed does."""
    first = [{"run.seed": seed, "optim.lr": lr} for lr in (0.1, 0.2) for seed in range(2)]
    firsts = copies(run_dir, tmp_path / "first", *first)
    second = [
        {"run.seed": number % 2, "run.init_from": str(one)} for number, one in enumerate([*firsts, "gone"])
    ]
    runs = copies(run_dir, tmp_path / "second", *second)
    groups = [[run.name for run in group.runs] for group in grouped(runs)]
    assert groups == [["run-0", "run-1"], ["run-2", "run-3"], ["run-4"]]
    assert [group.settings for group in grouped(runs)] == [
        {"run.init_from": str(one)} for one in (firsts[0], firsts[2], "gone")
    ]
    with pytest.raises(RunError, match="the same seed twice"):
        grouped([*runs, *copies(run_dir, tmp_path / "again", second[0])])


def test_one_seed_says_that_its_interval_is_over_users(run_dir: Path, tmp_path: Path) -> None:
    runs = copies(run_dir, tmp_path, {}, {"model.variant": "paper"})
    document = analyse("ablations", runs, tmp_path / "out")
    assert {row["tasks"]["rec"]["ndcg@10"]["interval"] for row in document["rows"]} == {"users"}
    assert "what another seed would change" in (tmp_path / "out" / "ablations.html").read_text()


def test_the_same_run_twice_is_refused(run_dir: Path, tmp_path: Path) -> None:
    runs = copies(run_dir, tmp_path, {}, {})
    with pytest.raises(RunError, match="the same seed twice"):
        analyse("ablations", runs, tmp_path / "out")


def test_sensitivity_draws_a_grid(run_dir: Path, tmp_path: Path) -> None:
    grid = [
        {"model.temperature": tau, "model.contrastive_weight": weight, "worse": place}
        for place, (tau, weight) in enumerate([(0.05, 0.01), (0.05, 0.1), (0.2, 0.01), (0.2, 0.1)])
    ]
    runs = copies(run_dir, tmp_path, *grid)
    document = analyse("sensitivity", runs, tmp_path / "out")
    assert document["keys"] == ["model.contrastive_weight", "model.temperature"]
    values = [row["tasks"]["src"]["ndcg@10"]["value"] for row in document["rows"]]
    assert values == sorted(values, reverse=True)
    names = {path.name for path in (tmp_path / "out").glob("*.svg")}
    assert names == {
        "sensitivity-contrastive_weight.svg", "sensitivity-temperature.svg",
        "sensitivity-map-rec.svg", "sensitivity-map-src.svg",
    }  # fmt: skip


def test_a_map_of_two_settings_leaves_out_runs_that_differ_in_a_third(run_dir: Path, tmp_path: Path) -> None:
    grid = [(0.05, 0.01, "extended"), (0.05, 0.1, "extended"), (0.2, 0.01, "extended"), (0.05, 0.01, "paper")]
    keys = ("model.temperature", "model.contrastive_weight", "model.variant")
    points = [{**dict(zip(keys, point, strict=True)), "worse": 5 * n} for n, point in enumerate(grid)]
    runs = copies(run_dir, tmp_path, *points)
    document = analyse("sensitivity", runs, tmp_path / "out")
    rows, base = document["rows"], document["rows"][0]["settings"]
    found = sensitivity._grid(sensitivity._apart_in(rows, keys[:2], base), keys[:2], "rec", "ndcg@10")
    assert found is not None and found[0][0, 0] == rows[0]["tasks"]["rec"]["ndcg@10"]["value"]
    (table,) = [part for part in sensitivity.section(document, tmp_path).parts if isinstance(part, Table)]
    assert table.head[3] == "model.variant"
    assert [row[3] for row in table.rows] == ["extended", "extended", "extended", "paper"] * 2


def test_transfer_compares_both_with_each_single_task(run_dir: Path, tmp_path: Path) -> None:
    runs = copies(
        run_dir, tmp_path, {}, {"data.weight_rec": 0.0, "worse": 2}, {"data.weight_src": 0.0, "worse": 1}
    )
    document = analyse("transfer", runs, tmp_path / "out")
    assert [row["label"] for row in document["rows"]] == ["both tasks", "search only", "recommendation only"]
    gains = {task: found["against"]["difference"] for task, found in document["gains"].items()}
    assert gains["src"] > gains["rec"] > 0  # both − single: positive where the other task helps
    with pytest.raises(RunError, match=r"these differ in model\.variant"):
        analyse("transfer", copies(run_dir, tmp_path / "b", {}, {"model.variant": "paper"}), tmp_path / "o")


def test_labels_of_ablations() -> None:
    base = {"model.views": "both", "optim.lr": 0.1}
    assert label({"model.views": "cf", "optim.lr": 0.1}, base) == "without semantic view"
    assert label({"model.views": "both", "optim.lr": 0.2}, base) == "lr 0.2"
    ours, other = {"model.name": "gensr", **base}, {"model.name": "sasrec", "model.dim": 64, "optim.lr": 0.3}
    groups = [ours, ours | {"model.views": "cf"}, other, other | {"model.dim": 32}]
    assert labels(groups) == ["as it is", "without semantic view", "sasrec", "sasrec, dim 32"]


def test_runs_of_one_title_are_told_apart_by_their_folders() -> None:
    places = ("T/runs/gensr/seed-0", "P/variants/no-cf/seed-0", "T/runs/sasrec/seed-0")
    runs = [{"title": "SASRec" if "sasrec" in place else "GenSR", "run": place} for place in places]
    assert titled(runs) == ["GenSR gensr/seed-0", "GenSR no-cf/seed-0", "SASRec"]
    assert titled(runs[1:]) == ["GenSR", "SASRec"]


def test_gradients_read_the_cf_table_of_an_events_fold(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full table has seen the clicks of training events: their loss by it is not the one in training."""
    run_dir = make_run(tmp_path, prepared, "model.backbone=scratch:nano", holdout="crossfit")
    read: list[bool] = []
    whole = GenSR.cf_vectors

    def cf_vectors(model: GenSR, items: torch.Tensor, fold_B: torch.Tensor) -> torch.Tensor:
        found = whole(model, items, fold_B)
        folds = model.tables.cf_folds[fold_B.clamp(min=0)[:, None], items]
        read.append(bool((fold_B >= 0).any()) and torch.equal(found[fold_B >= 0], folds[fold_B >= 0]))
        assert not any(module.training for module in model.modules() if module is not model)
        return found

    monkeypatch.setattr(GenSR, "cf_vectors", cf_vectors)
    analyse("gradients", [run_dir], tmp_path / "gradients", Options(num_events=128))
    assert read and all(read)


@pytest.mark.parametrize("asked", [100, 0])
def test_gradients_that_are_compared_are_of_as_many_events_and_of_different_ones(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    """A task against itself on fewer events, or on the same ones, does not say what noise does to both."""
    read: list[list[int]] = []
    loss = gradients._loss

    def noted(model: Any, batches: Any) -> Any:
        read.append([int(event) for batch in batches for event in batch.event_id])
        return loss(model, batches)

    monkeypatch.setattr(gradients, "_loss", noted)
    (run,) = analyse("gradients", [run_dir], tmp_path / "out", Options(num_events=asked))["runs"]
    folder = PreparedFolder.at(load_run_model(run_dir)[1].data.dir)
    fewest = min(folder.manifest.raw["counts"]["train"][task] for task in ("rec", "src"))
    assert run["num_events"] == min(asked or 512, fewest // 2) // 64 * 64 > 0
    assert [len(events) for events in read] == [run["num_events"]] * 4
    for one, other in (read[:2], read[2:]):
        assert len({*one, *other}) == 2 * run["num_events"]
    assert f"mean over {run['num_events']} training events" in (tmp_path / "out/gradients.html").read_text()


def test_a_task_is_compared_with_itself_on_what_both_tasks_share(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter(
        {"both": torch.tensor(both), name: torch.ones(1)}
        for name, both in (("a", [1.0, 0.0]), ("a", [0.0, 1.0]), ("b", [1.0, 1.0]), ("b", [1.0, 1.0]))
    )
    monkeypatch.setattr(gradients, "gradients_of", lambda model, loss: next(given))
    batches: Any = {task: ([], []) for task in (0, 1)}
    point = gradients._point(load_run_model(run_dir)[0], batches, 1, is_best=True)
    assert point["itself"] == {"src": 0.0, "rec": pytest.approx(1.0)}
    assert point["layers"][-1]["num_parameters"] == 2


# ---- the verb ----------------------------------------------------------------------------------------------


def test_the_verb_on_one_run(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["analyse", "space", str(run_dir), str(out), "--events", "40"])
    assert done.exit_code == 0, done.output
    (run,) = json.loads((out / "space.json").read_text())["runs"]
    assert run["title"] == "GenSR" and run["hidden"]["method"] == "pca"
    assert 0 <= run["hidden"]["overlap"] <= 1 and run["history"]["num_points"] == [40, 40]
    done = CliRunner().invoke(app, ["analyse", "gradients", str(run_dir), str(out), "--events", "128"])
    assert done.exit_code == 0, done.output
    (point,) = json.loads((out / "gradients.json").read_text())["runs"][0]["points"]
    assert point["layers"][-1]["layer"] == "total" and point["best"]
    assert -1 <= point["layers"][-1]["cosine"] <= 1
    for wrong, said in (("nothing", "there is no analysis nothing"), ("transfer", "at least 2 RUN")):
        result = CliRunner().invoke(app, ["analyse", wrong, str(run_dir), str(out)])
        assert result.exit_code != 0 and said in str(result.exception)


def test_a_run_is_not_taken_for_the_folder_to_write_to(run_dir: Path) -> None:
    """The last of three runs was left out of the analysis, whose pictures went into it."""
    before = sorted(run_dir.iterdir())
    done = CliRunner().invoke(app, ["analyse", "space", str(run_dir), str(run_dir)])
    assert isinstance(done.exception, ConfigError) and f"{run_dir} is a run folder" in str(done.exception)
    assert sorted(run_dir.iterdir()) == before


def test_a_page_says_of_which_split_its_events_are(run_dir: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", Options(split="valid", num_events=40)
    assert analyse("space", [run_dir], out, options)["split"] == "valid"
    text = (out / "space.html").read_text()
    assert "Points are validation events" in text and "test events" not in text
    runs = copies(run_dir, tmp_path, {}, {"model.temperature": 0.5})  # their evaluations are of test events
    for what, split in (("ablations", "test"), ("sensitivity", "test"), ("gradients", "train")):
        found = analyse(what, [run_dir] if what == "gradients" else runs, out, options)
        assert found["split"] == split


def test_options_are_kept_in_the_document(run_dir: Path, tmp_path: Path) -> None:
    options = replace(Options(), metric="recall@5", seed=7)
    document = analyse("ablations", copies(run_dir, tmp_path, {}, {"optim.lr": 0.5}), tmp_path / "o", options)
    assert (document["metric"], document["seed"]) == ("recall@5", 7)
