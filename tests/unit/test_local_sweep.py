"""gensr sweep: what the file may say, which runs it makes, that it resumes; with a formula for training."""

import json
import time
from pathlib import Path
from random import Random
from threading import Barrier
from typing import Any

import pytest

from data_shards.settings import to_yaml
from trainer.configs import load_config
from trainer.errors import ConfigError, RunError
from trainer.experiments import local_sweep
from trainer.experiments.cells import Cell
from trainer.experiments.verbs import VerbFailed

TPE = """
preset: demo
search: {search}
trials: 6
seed: 3
settings: {{data.dir: data/x, run.max_steps: 20}}
space:
  optim.lr: {{low: 1e-4, high: 1e-2, log: true}}
  optim.beta2: [0.9, 0.99]
"""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Cell]:
    """Cells in the order in which they are trained; best near lr = 1e-3, and lr below 2e-4 fails."""
    cells: list[Cell] = []

    def train(cell: Cell) -> None:
        if (cell.run_dir / "status.json").is_file():
            return
        cells.append(cell)
        config = load_config(str(cell.settings_file), [f"run.dir={cell.run_dir}", *cell.overrides])
        if config.optim.lr < 2e-4:
            raise VerbFailed("gensr train: too low")
        cell.run_dir.mkdir(parents=True)
        (cell.run_dir / "config.yaml").write_text(to_yaml(config))
        value = 1 - abs(config.optim.lr - 1e-3)
        status = {"status": "finished", "progress": {"step": 20, "best_step": 20, "best_value": value}}
        (cell.run_dir / "status.json").write_text(json.dumps(status))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_sweep, "train_cell", train)
    return cells


def sweep_of(text: str, *words: str, preset: str | None = None) -> local_sweep.Sweep:
    Path("sweep.yaml").write_text(text)
    return local_sweep.read("sweep.yaml", preset, ["run.dir=runs/s", *words])


def test_a_grid_takes_every_combination_and_resumes(trained: list[Cell]) -> None:
    space = "{optim.lr: [1e-4, 3e-4, 9e-4], optim.beta2: [0.9, 0.99]}"
    sweep = sweep_of(f"preset: demo\nsettings: {{data.dir: x}}\nspace: {space}", "run.seed=7")
    document = local_sweep.run(sweep, "none")
    assert len(trained) == 6 == sweep.num_runs
    assert len({cell.run_dir for cell in trained}) == 6
    assert "run.seed=7" in trained[0].overrides and "data.dir=x" in trained[0].overrides
    assert not [word for word in trained[0].overrides if word.startswith("run.dir=")]
    assert document["runs"][0]["run"] == "04-lr-9e-4-beta2-0.9"
    assert len(document["runs"]) == 4  # two failed before they began
    assert "04-lr-9e-4-beta2-0.9" in Path("runs/s/sweep.txt").read_text()
    lines: list[str] = []
    local_sweep.run(sweep, "none", lines.append)
    assert len(trained) == 8  # the failed ones, once more
    assert sum("done before" in line for line in lines) == 4 and any("too low" in line for line in lines)


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_drawn_settings_stay_in_the_space_and_resume(trained: list[Cell], search: str) -> None:
    sweep = sweep_of(TPE.format(search=search))
    local_sweep.run(sweep, "none")
    configs = [load_config("demo", cell.overrides) for cell in trained]
    assert len(configs) == 6
    assert all(1e-4 <= config.optim.lr <= 1e-2 and config.optim.beta2 in (0.9, 0.99) for config in configs)
    assert len({config.optim.lr for config in configs}) == 6
    assert max(len(cell.name) for cell in trained) < len("00-lr-0.0000000-beta2-0.99")  # for people: rounded
    (failed,) = (cell.name for cell, config in zip(trained, configs, strict=True) if config.optim.lr < 2e-4)
    local_sweep.run(sweep, "none")
    assert [cell.name for cell in trained[6:]] == [failed]  # its journal knows what was drawn


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_what_is_drawn_at_once_does_not_depend_on_who_ends_first(
    trained: list[Cell], search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 trials: TPE draws its first ten at random."""
    monkeypatch.setattr("trainer.experiments.pool.num_cores", lambda: 4)
    train, drawn = local_sweep.train_cell, []
    text = TPE.format(search=search).replace("trials: 6", "trials: 14")
    for case in ("a", "b", "stopped"):
        random = Random(case)

        def late(cell: Cell, random: Random = random, case: str = case) -> None:
            time.sleep(random.random() / 50)
            if case == "stopped" and len(trained) == 12:
                trained.append(cell)
                raise KeyboardInterrupt
            train(cell)

        monkeypatch.setattr(local_sweep, "train_cell", late)
        trained.clear()
        sweep = sweep_of(text, f"run.dir=runs/{case}")
        if case == "stopped":
            with pytest.raises(KeyboardInterrupt):
                local_sweep.run(sweep, "none", jobs=3)
        local_sweep.run(sweep, "none", jobs=3)
        drawn.append({cell.name for cell in trained})
    assert drawn[0] == drawn[1] == drawn[2] and len(drawn[0]) == 14


def test_a_grid_has_jobs(trained: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.experiments.pool.num_cores", lambda: 4)
    train, together = local_sweep.train_cell, Barrier(2, timeout=20)

    def two(cell: Cell) -> None:
        together.wait()
        train(cell)

    monkeypatch.setattr(local_sweep, "train_cell", two)
    space = "{optim.lr: [1e-4, 3e-4, 9e-4], optim.beta2: [0.9, 0.99]}"
    lines: list[str] = []
    sweep = sweep_of(f"preset: demo\nsettings: {{data.dir: x}}\nspace: {space}")
    document = local_sweep.run(sweep, "none", lines.append, jobs=2)
    assert len(trained) == 6 and document["runs"][0]["run"] == "04-lr-9e-4-beta2-0.9"
    began = [line for line in lines if line.startswith("[")]
    assert [line.split()[0] for line in began] == [f"[{n}/6]" for n in range(1, 7)]
    assert {line.split()[1][:2] for line in began[:2]} == {"00", "01"}  # either thread may be the first
    with pytest.raises(ConfigError, match="Give --jobs 4"):
        local_sweep.run(sweep, "none", jobs=5)


def test_the_best_run_or_all_are_evaluated(trained: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[str] = []
    monkeypatch.setattr(local_sweep, "evaluate_cell", lambda cell, kinds, events: evaluated.append(cell.name))
    sweep = sweep_of("preset: demo\nsettings: {data.dir: x}\nspace: {optim.lr: [3e-4, 9e-4]}")
    local_sweep.run(sweep, "best")
    assert evaluated == ["01-lr-9e-4"]
    local_sweep.run(sweep, "all")
    assert evaluated[1:] == ["01-lr-9e-4", "00-lr-3e-4"]


def test_the_list_of_a_cluster_sweep_is_read_too(trained: list[Cell]) -> None:
    points = "- {optim.lr: 3e-4}\n- {optim.lr: 9e-4, model.dropout: 0.2}"
    sweep = sweep_of(points, "data.dir=x", preset="demo")
    local_sweep.run(sweep, "none")
    assert [cell.overrides[-1] for cell in trained] == ["optim.lr=3e-4", "model.dropout=0.2"]
    with pytest.raises(ConfigError, match="needs a preset"):
        sweep_of(points, "data.dir=x")


def test_all_failed(trained: list[Cell]) -> None:
    sweep = sweep_of("preset: demo\nsettings: {data.dir: x}\nspace: {optim.lr: [1e-4]}")
    with pytest.raises(RunError, match="all 1 runs failed; the last: gensr train: too low"):
        local_sweep.run(sweep, "none")


def test_a_search_whose_runs_all_failed_begins_again(
    trained: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(cell: Cell) -> None:
        raise VerbFailed("gensr train: no data")

    sweep = sweep_of(TPE.format(search="random").replace("trials: 6", "trials: 2"))
    with monkeypatch.context() as patch:
        patch.setattr(local_sweep, "train_cell", failing)
        for _ in range(2):
            with pytest.raises(RunError, match="all 2 runs failed; the last: gensr train: no data"):
                local_sweep.run(sweep, "none")
    assert len(local_sweep.run(sweep, "none")["runs"]) == 2


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ("low: 1e-4", "low: 2e-4", "space was .*0.0001.*, is .*0.0002"),
        ("{low: 1e-4, high: 1e-2, log: true}", "[1e-3]", "begun with another search: space was"),
        ("[0.9, 0.99]", "[0.9, 0.99, 0.999]", "space was"),
        ("seed: 3", "seed: 4", "seed was 3, is 4"),
        ("search: random", "search: tpe", "search was random, is tpe"),
        ("max_steps: 20", "max_steps: 30", "run.max_steps was 20, is 30"),
        ("data/x", "data/y", "data was .*data/x, is .*data/y"),
    ],
)
def test_a_search_does_not_go_on_as_another(trained: list[Cell], before: str, now: str, message: str) -> None:
    text = TPE.format(search="random").replace("trials: 6", "trials: 1")
    local_sweep.run(sweep_of(text), "none")
    assert before in text
    with pytest.raises(ConfigError, match=message):
        local_sweep.run(sweep_of(text.replace(before, now)), "none")
    assert len(trained) == 1


def test_a_grid_that_was_changed_ranks_its_own_runs(trained: list[Cell]) -> None:
    text = "preset: demo\nsettings: {data.dir: x}\nspace: {optim.lr: [1e-3, 3e-4]}"
    local_sweep.run(sweep_of(text), "none")
    ranked = local_sweep.run(sweep_of(text.replace("[1e-3", "[5e-4")), "none")["runs"]
    assert [row["run"] for row in ranked] == ["00-lr-5e-4", "01-lr-3e-4"]
    with pytest.raises(
        ConfigError, match=r"00-lr-5e-4 was trained with other settings: run\.seed was 0, is 7"
    ):
        local_sweep.run(sweep_of(text.replace("[1e-3", "[5e-4"), "run.seed=7"), "none")


def test_between_integers_integers_are_drawn(trained: list[Cell]) -> None:
    space = "space: {optim.lr: [1e-3], optim.warmup_steps: {low: 1, high: 1e3, log: true}}"
    text = f"preset: demo\nsearch: random\ntrials: 3\nsettings: {{data.dir: x}}\n{space}"
    local_sweep.run(sweep_of(text), "none")
    drawn = {load_config("demo", cell.overrides).optim.warmup_steps for cell in trained}
    assert len(drawn) == 3 and all(1 <= number <= 1000 for number in drawn)
    with pytest.raises(ConfigError, match=r"low and high must be integers, as optim\.warmup_steps is"):
        sweep_of(text.replace("low: 1,", "low: 1.5,"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: demo\nspace: {optim.lr: [1e-4]}", "data.dir=… must be given"),
        ("preset: demo\nsettings: {data.dir: x}\nspace: {optim.lrr: [1e-4]}", "Did you mean optim.lr"),
        ("preset: demo\nsettings: {data.dir: x}\nspace: {optim.lr: [1e-4, -1]}", "greater than 0"),
        (
            "preset: demo\nsettings: {data.dir: x}\nspace: {optim.lr: {low: 1, high: 2}}",
            "a range has no grid",
        ),
        ("preset: demo\nsearch: tpe\nspace: {optim.lr: {low: 2, high: 1}}", "low must be below high"),
        ("preset: demo\nsearch: tpe\nspace: {optim.lr: {low: a, high: 1}}", "must be numbers"),
        ("preset: demo\nsearch: tpe\nspace: {optim.lr: 3}", "must be a list of choices"),
        ("preset: demo\nspace: {}", "name at least one key"),
        ("preset: demo\nserach: tpe\nspace: {optim.lr: [1]}", "Did you mean search"),
        ("space: {optim.lr: [1]}", "preset.*is required"),
        ("a: [", "not a readable YAML"),
    ],
)
def test_mistakes_do_not_start_a_run(trained: list[Any], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_of(text)
