"""gensr table --budget: minutes become epochs before anything runs. By hand, and through the command."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_shards.settings import read_yaml
from trainer.cli import app
from trainer.config import Config
from trainer.configs import load_config
from trainer.errors import ConfigError
from trainer.experiments import submit as jobs
from trainer.experiments.costs import MIN_EPOCHS, Machine, Size, SystemCost, cost_of, this_machine
from trainer.experiments.paper.recipes import read_recipes, recipe_of
from trainer.experiments.table.budget import (
    Runs,
    Times,
    epochs_within,
    longest_training_s,
    plan_times,
)
from trainer.experiments.table.plan import Request, dry_run, make_plan
from trainer.models.zoo import model_names

ONE_CORE = Machine(cores=1, gpus=0)
EVALUATION = {"sampled": 20.0, "full": 30.0}


def runs_of(epochs: float, epoch_s: float, validations_s: float = 0.0, **changes: Any) -> Runs:
    cost = SystemCost(True, epochs, epoch_s, validations_s, EVALUATION, start_s=5.0)
    return Runs(**{"seeds": 1, "trials": 0, "candidates": ("sampled",), "cost": cost, **changes})


COUNTED = Runs(1, 0, ("sampled",), SystemCost(False, 0.0, 0.0, 0.0, EVALUATION, start_s=5.0))


def times(runs: dict[str, Runs], minutes: float, known: Any = None) -> Times:
    return plan_times(runs, ONE_CORE, minutes, known)


# ---- T -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "available_s", "expected"),
    [
        ([(1, 10.0), (1, 30.0)], 40.0, None),
        ([(1, 10.0), (1, 30.0)], 39.0, 29.0),
        ([(1, 10.0), (1, 30.0)], 20.0, 10.0),
        ([(1, 10.0), (1, 30.0)], 12.0, 6.0),
        ([(3, 30.0), (2, 10.0)], 50.0, 10.0),
        ([(3, 30.0), (2, 10.0)], 80.0, 20.0),
        ([], 0.0, None),
    ],
)
def test_the_longest_training_fills_what_is_there(
    full: list[tuple[int, float]], available_s: float, expected: float | None
) -> None:
    found = longest_training_s(full, available_s)
    assert found == expected
    if found is not None:
        assert sum(runs * min(seconds, found) for runs, seconds in full) == pytest.approx(available_s)


def test_a_system_that_needs_less_keeps_its_preset_and_the_rest_is_cut_alike() -> None:
    runs = {"quick": runs_of(10, 6.0), "slow": runs_of(100, 60.0, 12.0), "slower": runs_of(5, 300.0)}
    planned = times(runs, 10)  # 600 s: 90 for starts and evaluations, 12 for validations, 60 for quick
    assert planned.longest_s == (600 - 90 - 12 - 60) / 2
    assert planned.of("quick").epochs == 10 and not planned.of("quick").is_cut
    assert planned.of("slow").epochs == 3.65 and planned.of("slower").epochs == 0.73
    assert planned.of("slow").seconds == pytest.approx(30 + 12 + 3.65 * 60)
    assert planned.seconds == pytest.approx(600) and planned.seconds <= 600


def test_trials_are_trained_and_seeds_are_evaluated_too() -> None:
    one = runs_of(10, 6.0, seeds=2, trials=3, candidates=("sampled", "full"))
    assert one.seconds(10) == 3 * (5 + 60) + 2 * (5 + 60 + 5 + 20 + 5 + 30)
    assert times({"one": one, "counted": COUNTED}, 60).of("counted").seconds == 30


def test_more_minutes_never_mean_fewer_epochs() -> None:
    runs = {"quick": runs_of(10, 6.0, seeds=3), "slow": runs_of(100, 60.0, seeds=3), "counted": COUNTED}
    before = {"quick": 0.0, "slow": 0.0}
    for minutes in (6, 10, 20, 60, 200, 400):
        planned = times(runs, minutes)
        assert planned.seconds <= 60 * minutes
        for name, least in before.items():
            assert planned.of(name).epochs >= least
            before[name] = planned.of(name).epochs
    assert before == {"quick": 10, "slow": 100} and planned.longest_s is None
    assert times(runs, 0).systems == planned.systems, "without a budget nothing is cut"


def test_a_budget_that_is_too_small_names_the_smallest_that_works() -> None:
    runs = {"slow": runs_of(100, 6000.0), "quick": runs_of(0.01, 6.0), "counted": COUNTED}
    with pytest.raises(ConfigError, match=r"--budget 3 is too small: .* smallest that works is --budget 4\."):
        times(runs, 3)
    smallest = times(runs, 4)
    assert smallest.of("slow").epochs >= MIN_EPOCHS and smallest.of("quick").epochs == 0.01


def test_a_system_that_is_added_later_is_never_without_epochs() -> None:
    cost = runs_of(5.0, 6000.0).cost
    assert epochs_within(cost, 60.0) == MIN_EPOCHS and epochs_within(cost, 600.0) == 0.1
    assert epochs_within(cost, None) == 5.0


def test_later_calls_keep_t_and_the_epochs_of_the_first() -> None:
    first = times({"slow": runs_of(100, 60.0)}, 10)
    known = json.loads(json.dumps(first.facts()))
    more = {"slow": runs_of(100, 60.0, seeds=3), "other": runs_of(50, 30.0)}
    with pytest.raises(
        ConfigError, match=r"with the epochs of the first call, which stay, .* Give --budget 40"
    ):
        times(more, 30, known)
    second = times(more, 40, known)
    assert second.longest_s == first.longest_s and second.of("slow").epochs == first.of("slow").epochs
    assert second.of("other").epochs == pytest.approx(19, abs=0.01)


def end_of(runs: dict[str, Runs], planned: Times, jobs: int, first: int) -> float:
    """When `jobs` threads have made all runs, each taking the next that may begin; the systems from the
    `first` on."""
    free, waiting = [0.0] * jobs, list(runs)[first:] + list(runs)[:first]
    todo: list[tuple[float, float]] = []  # (may begin at, takes)
    for name in waiting:
        cost, epochs = runs[name].cost, planned.of(name).epochs
        ready = runs[name].trials * cost.run_s(epochs)
        begin = free.pop(free.index(min(free)))
        free.append(begin + ready)
        todo += [(begin + ready, cost.run_s(epochs, runs[name].candidates))] * runs[name].seeds
    for ready, takes in todo:
        begin = free.pop(free.index(min(free)))
        free.append(max(begin, ready) + takes)
    return max(free)


@pytest.mark.parametrize("jobs", [1, 2, 3, 7])
def test_jobs_share_the_minutes_and_stay_within_them(jobs: int) -> None:
    runs = {
        "slow": runs_of(100, 60.0, seeds=3),
        "quick": runs_of(10, 6.0, seeds=3, trials=2),
        "slower": runs_of(5, 300.0, seeds=3),
        "counted": COUNTED,
    }
    one, planned = times(runs, 20), plan_times(runs, ONE_CORE, 20, jobs=jobs)
    assert one.longest_s is not None and planned.longest_s is not None
    assert planned.seconds <= 20 * 60 and planned.seconds > 0.99 * 20 * 60, "what is there is used"
    assert planned.longest_s >= one.longest_s * (1 if jobs == 1 else 1.3)
    for first in range(len(runs)):
        assert end_of(runs, planned, jobs, first) <= planned.seconds + 1e-6
    assert "each, " * (jobs > 1) in planned.lines()[0] and planned.facts()["jobs"] == jobs


def test_a_chain_is_as_long_as_it_is_however_many_jobs() -> None:
    alone = {"slow": runs_of(100, 60.0, trials=4)}  # nothing can run beside it
    assert plan_times(alone, ONE_CORE, 20, jobs=8).longest_s == times(alone, 20).longest_s
    with pytest.raises(ConfigError, match="smallest that works is --budget 1"):
        plan_times(alone, ONE_CORE, 0.5, jobs=8)


def test_what_is_cut_is_said() -> None:
    cut = times({"slow": runs_of(100, 60.0), "quick": runs_of(1, 6.0)}, 10)
    said = {system.model: system.note for system in cut.systems}
    assert said == {"slow": "trained for 8.9 of the preset's 100 epochs, by --budget", "quick": ""}
    assert times({"slow": runs_of(100, 60.0)}, 0).of("slow").note == ""  # no budget
    text = "\n".join(cut.lines())
    assert "budget 10 minutes: 2 runs, about 10.0 minutes on" in text
    assert "no run trains longer than 8.9 minutes" in text
    head, slow = (line.split() for line in cut.lines()[1:3])
    assert head == ["system", "runs", "epochs", "of", "preset", "time"]
    assert slow[:4] == ["slow", "1", "8.9", "100"] and slow[5] == "minutes"
    uncut = times({"slow": runs_of(1.07293, 60 * 60.0)}, 0).lines()[:3]
    assert "of preset" not in uncut[1] and uncut[2].split()[:3] == ["slow", "1", "1.07"]
    assert "1 runs, about 1.08 hours on" in uncut[0]
    facts = [
        times({"slow": runs_of(100, 60 * 60.0)}, minutes).facts()["systems"]["slow"] for minutes in (600, 0)
    ]
    assert ["preset_epochs" in of_system for of_system in facts] == [True, False]


def test_the_whole_scientific_table_fits_six_hours_on_two_cores() -> None:
    """What README.md says, by speeds.yaml: three seeds of every system, both kinds of candidates, of the
    whole catalogue the usual sample of events."""
    two_cores, size = Machine(cores=2, gpus=0), Size((41_858, 40_757), (8_317, 8_077), (8_317, 8_116), 4_344)
    runs = {}
    for name in model_names():
        preset = load_config("scientific_small" if name == "gensr" else name)
        cost = cost_of(preset, size, two_cores, Request("", Path()).events)
        runs[name] = Runs(3 if cost.trained else 1, 0, ("sampled", "full"), cost)
    planned = plan_times(runs, two_cores, 360)
    assert planned.seconds <= 6 * 3600 and planned.longest_s is not None and planned.longest_s > 60
    assert planned.seconds > 0.95 * 6 * 3600, "what is there is used"


# ---- plan and command --------------------------------------------------------------------------------------


def asked(data: Path, out: Path, **changes: Any) -> Request:
    models = ("popularity", "sasrec", "gru4rec")
    return Request(str(data), out, **{"models": models, "seeds": 1, "budget": 3.0, **changes})


def test_a_budget_becomes_max_epochs_and_stays(prepared: Path, tmp_path: Path) -> None:
    # so few events train in seconds: with many epochs asked for, minutes are what ends them
    long = {"models": ("popularity", "sasrec"), "presets": {"sasrec": str(long_preset(tmp_path))}}
    first = make_plan(asked(prepared, tmp_path / "out", **long), ONE_CORE)
    assert first.times is not None
    epochs = first.times.of("sasrec").epochs
    assert 0 < epochs < 1e6 and first.configs["sasrec"].run.max_epochs == epochs
    written = read_yaml(tmp_path / "out" / "settings" / "sasrec.yaml")
    assert written["run"]["max_epochs"] == epochs
    stored = json.loads((tmp_path / "out" / "plan.json").read_text())["budget"]
    assert stored["systems"]["sasrec"]["preset_epochs"] == 1e6 and stored["longest_s"] > 0

    again = make_plan(asked(prepared, tmp_path / "out", **long), Machine(64, 0))
    assert again.times == first.times, "the same words go on, on another machine, too"
    more = make_plan(asked(prepared, tmp_path / "out", **long, seeds=3, budget=9.0))
    assert more.configs == first.configs
    with pytest.raises(ConfigError, match="with the epochs of the first call, which stay"):
        make_plan(asked(prepared, tmp_path / "out", **long, seeds=3))
    with pytest.raises(ConfigError, match=r"--budget was 9\.0, is not given"):
        make_plan(asked(prepared, tmp_path / "out", **long, budget=0.0))


def test_a_plan_goes_on_with_other_jobs(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.experiments.pool.num_cores", lambda: 8)
    monkeypatch.setattr("trainer.runtime.launch.num_cores", lambda: 8)
    monkeypatch.setattr("trainer.runtime.device.has_gpu", lambda: False)
    long = {"models": ("popularity", "sasrec"), "presets": {"sasrec": str(long_preset(tmp_path))}, "seeds": 2}
    out, file = tmp_path / "out", tmp_path / "out" / "plan.json"
    first = make_plan(asked(prepared, out, **long))
    stored = json.loads(file.read_text())
    del stored["budget"]["jobs"]  # as the version without jobs has written it
    file.write_text(json.dumps(stored))
    for number, cores in ((4, 2), (1, 8), (8, 1), (1, 8)):
        again = make_plan(asked(prepared, out, **long, jobs=number))
        assert again.configs == first.configs, "T and the epochs stay"
        assert again.times is not None and again.times.jobs == number
        assert again.times.machine == Machine(cores, 0)
        assert json.loads(file.read_text())["budget"]["jobs"] == 1
    with pytest.raises(ConfigError, match="with the epochs of the first call, which stay"):
        make_plan(asked(prepared, out, **{**long, "seeds": 9}))
    with pytest.raises(ConfigError, match=r"--jobs 9: .* Give --jobs 8"):
        make_plan(asked(prepared, out, **long, jobs=9))
    fresh = make_plan(asked(prepared, tmp_path / "fresh", **long, jobs=2))
    assert fresh.times is not None and fresh.times.longest_s is not None and first.times is not None
    assert fresh.times.machine == Machine(4, 0)


def test_a_run_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.runtime.launch.num_cores", lambda: 8)
    monkeypatch.setattr("trainer.runtime.device.has_gpu", lambda: False)
    found = {
        (threads, jobs): this_machine(threads, jobs).cores for threads in (0, 2, 6) for jobs in (1, 2, 8)
    }
    assert found == {
        (0, 1): 8, (0, 2): 4, (0, 8): 1, (2, 1): 2, (2, 2): 2, (2, 8): 1, (6, 1): 6, (6, 2): 4, (6, 8): 1,
    }  # fmt: skip


def long_preset(folder: Path) -> Path:
    path = folder / "long.yaml"
    path.write_text("model: {name: sasrec}\nrun: {max_epochs: 1.0e+6, validate_every_steps: 1000000}\n")
    return path


def test_a_table_that_was_begun_without_a_budget_is_not_cut(prepared: Path, tmp_path: Path) -> None:
    make_plan(asked(prepared, tmp_path, budget=0.0))
    with pytest.raises(ConfigError, match="--budget was not given, is 30"):
        make_plan(asked(prepared, tmp_path, budget=30.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 1.0}, "give one of them"),
        ({"max_steps": 3}, "give one of them"),
        ({"overrides": ("run.max_epochs=2",)}, "leave out run.max_epochs=2"),
        ({"budget": 0.1}, "smallest that works is --budget 1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    prepared: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan(asked(prepared, tmp_path / "out", **changes), ONE_CORE)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_plans_and_writes_nothing(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["table", str(prepared), str(out), "--models", "popularity,sasrec", "--seeds", "2"]
    found = CliRunner().invoke(app, [*command, "--budget", "30", "--dry-run"], catch_exceptions=False)
    assert found.exit_code == 0 and "budget 30 minutes: 3 runs" in found.output, found.output
    assert "sasrec" in found.output and "counted" in found.output and not out.exists()
    as_json = CliRunner().invoke(app, [*command, "--dry-run", "--json"], catch_exceptions=False)
    document = json.loads(as_json.stdout)
    assert document["longest_s"] is None and document["systems"]["sasrec"]["runs"] == 2
    assert document["systems"]["sasrec"]["epochs"] == 300 and not out.exists()
    planned = dry_run(asked(prepared, out, models=("popularity", "sasrec"), seeds=2, budget=0.0))
    assert planned.seconds == document["seconds"]
    for wrong in (["--budget", "30", "--epochs", "1"], ["--budget", "0.1"]):
        refused = CliRunner().invoke(app, [*command, *wrong, "--dry-run"])
        assert refused.exit_code == 1 and not out.exists()


def test_a_recipe_gives_single_systems_their_settings(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    planned: dict[str, Config] = {}

    def keep_plan(request: Request, notify: Any) -> dict[str, Any]:
        planned.update(make_plan(request).configs)
        return {"rows": [{"model": "gensr", "results": {"sampled": {}}}]}

    monkeypatch.setattr("trainer.experiments.table.make_table", keep_plan)
    monkeypatch.setattr("trainer.experiments.table.render.markdown", lambda document: [])
    command = ["table", str(prepared), str(out), "--models", "gensr,sasrec,jsr,gru4rec", "--max-steps", "8"]
    command += ["--preset", "gru4rec=gru4rec", "--recipe", "scientific", "optim.lr=0.5"]
    found = CliRunner().invoke(app, command, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    steps = {name: config.optim.global_batch_size for name, config in planned.items()}
    assert steps == {"gensr": 64, "sasrec": 64, "jsr": 256, "gru4rec": 2048}  # --preset outranks a recipe
    assert planned["gensr"].model == load_config("scientific_small").model
    assert {config.optim.lr for config in planned.values()} == {0.5}  # so do words for all
    refused = CliRunner().invoke(app, [*command[:-2], "mars"])
    assert refused.exit_code == 1 and "there is no mars" in str(refused.exception or refused.output)


def test_every_recipe_fits_its_systems() -> None:
    for name in read_recipes()["data_sets"]:
        for model, words in recipe_of(name).get("own_settings", {}).items():
            config = load_config(model, words)
            # drawn as the candidates of a table are, or scores leave out what those differ by
            assert config.model.name == model and config.data.negatives == "uniform"


def test_recipes_for_short_training_leave_presets_as_published() -> None:
    own = recipe_of("demo")["own_settings"]
    for model in ("gru4rec", "nrhub"):
        assert load_config(model).optim.lr == 1e-3
        assert load_config(model, own[model]).optim.lr == 5e-3
    for recipe, dropout in (("", 0.1), ("demo", 0), ("scientific", 0)):
        for model in ("bsr", "idgenrec"):
            words = recipe_of(recipe)["own_settings"][model] if recipe else ()
            assert vars(load_config(model, words).model)["dropout"] == dropout
    for recipe, dropout, warmup in (("", 0.5, 4000), ("demo", 0.1, 50), ("scientific", 0.1, 50)):
        words = recipe_of(recipe)["own_settings"]["unifiedssr"] if recipe else ()
        config = load_config("unifiedssr", words)
        assert (vars(config.model)["dropout"], config.optim.warmup_steps) == (dropout, warmup)


def test_a_budget_of_arrays_speaks_of_what_a_job_gets(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, models = tmp_path / "out", ("popularity", "sasrec")
    monkeypatch.setattr(jobs, "checked", lambda preset, words, machines: (None, []))
    monkeypatch.setattr(jobs, "submit", lambda submission: ["7", "8"])
    command = ["table", str(prepared), str(out), "--models", ",".join(models), "--seeds", "1"]
    command += ["--budget", "30", "--candidates", "sampled"]
    found = CliRunner().invoke(app, [*command, "--submit", "--gpus-per-node", "4"], catch_exceptions=False)
    assert found.exit_code == 0 and "budget 30 minutes" in found.output, found.output
    stored = json.loads((out / "plan.json").read_text())["budget"]
    assert stored["machine"]["gpus"] == 4
    # the same command without --submit, which writes the table, keeps to it
    again = make_plan(asked(prepared, out, models=models, candidates=("sampled",), budget=30.0))
    assert again.times is not None and again.times.machine == Machine(stored["machine"]["cores"], 4)
