"""`gensr daily`: days of a log from raw files to the registry, as cron would run it."""

import json
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import ds_configs
from data_shards.checksum import file_sha256
from data_shards.prepare import prepare
from data_shards.schema import read_manifest
from data_shards.settings import overrides_of, to_yaml
from tests.mlflow_server import Server
from tests.unit.data_shards.test_append import FAST, cut
from tests.worlds import DAY_MS, START_MS, write_tables
from trainer.cf.build import train_cf
from trainer.cli import app
from trainer.config import Config
from trainer.configs import load_config
from trainer.errors import ConfigError, RunError
from trainer.experiments.daily import plan as plan_of_days
from trainer.experiments.daily import run as daily_run
from trainer.experiments.daily.day import Day
from trainer.experiments.daily.plan import Daily, DailySettings, read
from trainer.registry.promote import promote
from trainer.runs.run_folder import RunFolder
from trainer.training.loop import train

TRAINING = ["model.backbone=scratch:nano", "run.max_steps=2", "run.valid_events=16", "optim.warmup_steps=0"]
MULTINODE = ds_configs.path("accelerate_multinode.yaml")
DAYS = ["2023-11-20", "2023-11-21"]


@pytest.fixture(scope="module")
def yesterday(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data: a prepared folder of six days, with a CF table; runs/first, a run on it; hold/DAY, two days."""
    root = tmp_path_factory.mktemp("yesterday")
    raw = write_tables(root / "raw", users=30, items=80)
    cut(raw, START_MS + 6 * DAY_MS, root / "base", root / "rest")
    cut(root / "rest", START_MS + 7 * DAY_MS, root / "hold" / DAYS[0], root / "hold" / DAYS[1])
    for name in DAYS:  # items of a day that yesterday knows are not written again
        known = root / "rest" / "items.jsonl"
        if known.is_file():
            shutil.copy(known, root / "hold" / name)
    prepare("tables", root / "base", root / "data", FAST)
    train_cf(root / "data", ["cf.dim=16", "cf.max_epochs=2", "cf.num_folds=2"])
    words = [f"data.dir={root / 'data'}", f"run.dir={root / 'runs' / 'first'}", *TRAINING]
    train(load_config(None, words))
    return root


@pytest.fixture
def world(yesterday: Path, tmp_path: Path) -> Path:
    """FILE in a place of its own; no day is there yet."""
    shutil.copytree(yesterday / "runs", tmp_path / "runs")
    (tmp_path / "logs").mkdir()
    places = {"logs": "logs", "run": "runs/first", "out": "out"}
    lines = [f"{key}: {tmp_path / place}" for key, place in places.items()]
    lines += ["name: tiny", "settings: {run: {max_steps: 3}}", "margin: 1", "gain: false", "min_events: 1"]
    (tmp_path / "daily.yaml").write_text("\n".join(lines) + "\n")
    return tmp_path


def arrive(yesterday: Path, world: Path, day: str) -> None:
    shutil.copytree(yesterday / "hold" / day, world / "logs" / day)


def daily(world: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["daily", str(world / "daily.yaml"), *words])


def rows(world: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((world / "out" / "daily.json").read_text())["days"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_days_go_on_from_one_another(yesterday: Path, world: Path) -> None:
    out = world / "out"
    assert "no day is done yet" in daily(world).output
    arrive(yesterday, world, DAYS[0])
    dry = json.loads(daily(world, "--dry-run", "--json").stdout)
    assert dry["days"] == DAYS[:1] and not (out / "folders").exists()
    assert [line.split()[1] for line in dry["commands"][1:]] == [
        *("evaluate", "register", "promote"),  # RUN becomes the first champion
        *("train", "prepare", "cf", "train", "evaluate", "register"),
        *("train", "evaluate", "promote"),  # the champion without a step
    ]

    # the file of a day is damaged: named, with its log; mended, what was done stays
    events = world / "logs" / DAYS[0] / "events.jsonl"
    good = events.read_text()
    events.write_text('{"user_id": "u1", "item_id": "i1"}\n')
    failed = daily(world)
    assert failed.exit_code == 1 and isinstance(failed.exception, RunError)
    assert f"{DAYS[0]}: gensr prepare" in str(failed.exception)
    assert str(out / "logs" / DAYS[0] / "prepare.log") in str(failed.exception)
    events.write_text(good)
    first = daily(world, "settings.data.history_max=7")
    assert first.exit_code == 0, first.output
    assert [row["day"] for row in rows(world)] == DAYS[:1]
    logs = sorted((out / "logs" / DAYS[0]).iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [path.stem for path in logs] == [  # the order of the dry run
        *("evaluate-first", "register-first", "check", "prepare", "cf", "train", "evaluate", "register"),
        *("champion", "evaluate-champion"),
    ]
    first_row = rows(world)[0]
    assert (first_row["version"], first_row["champion"], first_row["decision"]) == (2, "1", "promoted")

    # the day's run began with the champion; what stood for the champion made no step
    new, carried = RunFolder(out / "runs" / DAYS[0]), RunFolder(out / "runs" / f"{DAYS[0]}-tiny-1")
    champion = RunFolder(out / "champions" / "tiny-1")
    assert new.read_config().run.init_from == str(champion.path)
    assert new.read_status()["progress"]["step"] == 3 and carried.read_status()["progress"]["step"] == 0
    begun = json.loads((carried.model / "model.json").read_text())["begun_with"]
    assert carried.read_config().data.history_max != new.read_config().data.history_max == 7
    assert begun == file_sha256(RunFolder(world / "runs" / "first").model / "model.safetensors")
    for task, figures in first_row["figures"].items():
        for run, key in ((carried, "champion"), (new, "candidate")):
            evaluation = json.loads(run.evaluation("test").read_text())[task]
            assert figures[key] == pytest.approx(evaluation["ndcg@10"], rel=1e-5)
    folder = read_manifest(out / "folders" / DAYS[0])
    assert folder.appended[-1]["manifest"] == read_manifest(yesterday / "data").hash

    # nothing is done twice, what comes too late is named, and the next day goes on from this one
    before = (out / "daily.json").read_bytes()
    events.write_text(good + good.splitlines()[0] + "\n")
    later = daily(world)
    assert later.exit_code == 0 and (out / "daily.json").read_bytes() == before
    assert f"{DAYS[0]} has changed since its day was done" in later.stderr
    arrive(yesterday, world, DAYS[1])
    (world / "logs" / "2023-11-19").mkdir()  # came too late
    (world / "logs" / "2023-11-22").mkdir()  # not whole: DAY 1 and 2 are
    for name in DAYS:
        (world / "logs" / name / "_SUCCESS").touch()
    (world / "logs" / "2023-11-19" / "_SUCCESS").touch()
    second = daily(world, "done_file=_SUCCESS", "keep=1")
    assert second.exit_code == 0, second.output
    assert "2023-11-19 came after a later day" in second.stderr
    assert [(row["day"], row["version"], row["champion"]) for row in rows(world)] == [
        (DAYS[0], 2, "1"),
        (DAYS[1], 3, "2"),
    ]
    assert (out / "folders" / DAYS[0]).exists()  # keep=1, and a rollback would need it
    folder = read_manifest(out / "folders" / DAYS[1])
    assert folder.appended[0]["manifest"] == read_manifest(yesterday / "data").hash
    assert len(folder.appended) == 2
    text = (out / "daily.txt").read_text()
    assert all(name in text for name in DAYS) and (out / "daily.png").stat().st_size > 5000
    with pytest.raises(RunError, match="has another data than version 3"):
        register_again(world, out)


def register_again(world: Path, out: Path) -> None:
    """Another candidate, against a run of weights that the champion has not."""
    from trainer.registry.store import registry_of
    from trainer.registry.versions import register

    run = out / "runs" / DAYS[1]
    register(run, "tiny")
    promote("tiny", registry_of(run), against=out / "runs" / f"{DAYS[1]}-tiny-2")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_was_interrupted_is_not_done_again(
    yesterday: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the decision and its row: the version is decided, and the day is written. The registry
    is a server, which sends what a store on this machine gives."""
    (world / "server").mkdir()
    server = Server(world / "server")
    server.start()
    try:
        _interrupted(yesterday, world, monkeypatch, server.uri)
    finally:
        server.kill()


def _interrupted(yesterday: Path, world: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    config = RunFolder(world / "runs" / "first").config
    config.write_text(to_yaml(load_config(str(config), [f"tracking.uri={uri}"])))
    arrive(yesterday, world, DAYS[0])

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(daily_run, "write_report", killed)
        assert daily(world).exit_code == 75
    assert not (world / "out" / "daily.json").exists()
    model = RunFolder(world / "out" / "runs" / DAYS[0]).model / "model.safetensors"
    written_ns = model.stat().st_mtime_ns
    again = daily(world)
    assert again.exit_code == 0, again.output
    assert again.stderr.count("done before") == 6 and model.stat().st_mtime_ns == written_ns
    assert [(row["day"], row["version"]) for row in rows(world)] == [(DAYS[0], 2)]
    assert [path.name for path in (world / "out" / "champions" / "tiny-1").iterdir()] == ["model"]
    assert not list(Path(tempfile.gettempdir()).glob("gensr-promote-*"))


def test_every_problem_of_the_file_is_told_at_once(world: Path) -> None:
    file = world / "daily.yaml"
    text = file.read_text().replace("settings: {run: {max_steps: 3}}", "settings: {run.dir: x, run.seed: -1}")
    more = "name: a/b\nlaunch: nosuchprogram x\ncf: {cf.dim: 0}\nprepare: {test_days: 2}"
    file.write_text(text.replace("name: tiny", more))
    with pytest.raises(ConfigError) as caught:
        read(file, [f"logs={world / 'nowhere'}"])
    problems = str(caught.value)
    assert problems.startswith("7 problems"), problems
    for part in ("nowhere is no folder", "settings.run.dir", "prepare.test_days", "nosuchprogram", "'a/b'"):
        assert part in problems
    for part in (
        "cf.dim must be greater than 0, got 0\n",
        "run.seed must be greater than or equal to 0, got -1\n",
    ):
        assert part in problems


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["candidates=hard"], "hard_negatives=99"),
        (["cf.cf.dim=32"], "cf.dim=32: the table of .* has 16"),
        (["settings.serving.retriever=runs/other"], "was trained on another folder"),
        (["settings.tracking.uri=sqlite:////elsewhere/mlflow.db"], "is another registry than"),
        (["launch=accelerate 'launch"], "No closing quotation"),
        (["launch=accelerate launch --num_machines=2"], "waits for 2 machines"),
        ([f"launch=accelerate launch --config_file {MULTINODE}"], "waits for 2 machines.* this one alone"),
        (["settings.run.max_epochs=-1"], "run.max_epochs must be"),
    ],
)
def test_what_would_end_a_day_after_hours_is_told_before(world: Path, words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(world / "daily.yaml", words)


def test_a_launch_on_one_machine_is_taken() -> None:
    for words in ("", "--nnodes 1", f"--config_file {MULTINODE} --num_machines 1", "--config_file nowhere"):
        plan_of_days._check_launch(f"accelerate launch {words}")


def test_the_length_that_the_file_asks_for_counts(world: Path) -> None:
    """RUN was made with run.max_steps, which would go before epochs."""
    (world / "daily.yaml").write_text(
        (world / "daily.yaml").read_text().replace("run: {max_steps: 3}", "run: {max_epochs: 0.5}")
    )
    plan = read(world / "daily.yaml")
    assert (plan.config.run.max_epochs, plan.config.run.max_steps) == (0.5, 0)
    assert "run.max_steps=0" in plan.training


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_day_that_says_too_little_is_not_decided(yesterday: Path, world: Path) -> None:
    arrive(yesterday, world, DAYS[0])
    few = daily(world, "min_events=1000")
    assert few.exit_code == 1 and "too few to decide by (min_events=1000)" in str(few.exception)
    assert not (world / "out" / "runs" / DAYS[0]).exists()
    shutil.rmtree(world / "out" / "folders" / DAYS[0])
    events = world / "logs" / DAYS[0] / "events.jsonl"
    old = [json.dumps({**json.loads(line), "time": START_MS}) for line in events.read_text().splitlines()]
    events.write_text("\n".join(old) + "\n")
    nothing_new = daily(world)
    assert nothing_new.exit_code == 1 and "no click of a later day" in str(nothing_new.exception)


def test_only_what_is_trained_and_served_goes_on(world: Path, yesterday: Path) -> None:
    config = RunFolder(world / "runs" / "first").config
    text = config.read_text()
    for name, problem in (("popularity", "counted, not trained"), ("jsr", "cannot be registered")):
        settings = {"data.dir": str(yesterday / "data"), "model.name": name}
        config.write_text(to_yaml(load_config(None, overrides_of(settings))))
        with pytest.raises(ConfigError, match=problem):
            read(world / "daily.yaml")
    config.write_text(text)
    assert read(world / "daily.yaml").cf == {"cf.dim": 16, "cf.max_epochs": 2, "cf.num_folds": 2}
    held = daily_run._alone(world / "out")
    with held, pytest.raises(RunError, match="another gensr daily"), daily_run._alone(world / "out"):
        pass


def test_a_damaged_list_of_days_is_not_begun_anew(world: Path) -> None:
    (world / "out").mkdir()
    (world / "out" / "daily.json").write_text('{"days": [{"da')
    with pytest.raises(ConfigError, match=r"daily\.json is damaged"):
        read(world / "daily.yaml")


def test_of_old_days_what_is_large_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = DailySettings(logs="logs", run="first", name="tiny", out=str(tmp_path), keep=1)
    plan, days = Daily(given, Config(), "tables", "", (), None), ["one", "two", "three", "four", "five"]
    done = [{"day": day, "version": number, "champion": "9"} for number, day in enumerate(days, 1)]
    (tmp_path / "daily.json").write_text(json.dumps({"days": done}))

    def large(day: str) -> list[Path]:
        runs = [plan.out / "runs" / day, plan.out / "runs" / f"{day}-tiny-9"]
        return [given.folder(day), plan.out / "logs" / day, *(run / "checkpoints" for run in runs)]

    def weights(day: str, number: int) -> list[Path]:
        runs = [plan.out / "runs" / day, plan.out / "runs" / f"{day}-tiny-9"]
        return [plan.champion(number), *(run / "model" for run in runs), *(run / "retrieval" for run in runs)]

    for number, day in enumerate(days, 1):
        for folder in (*large(day), *weights(day, number)):
            folder.mkdir(parents=True)
        (plan.out / "runs" / day / "evaluation-test.json").touch()
    plan.champion(9).mkdir()
    monkeypatch.setattr(daily_run, "in_use", lambda name, uri: {3, 4})
    monkeypatch.setattr(Day, "version", lambda day, run: {"one": 1}.get(day.name, 0))  # somebody deleted 2
    daily_run._forget(plan)
    for number, day in enumerate(days, 1):
        assert all(folder.exists() == (number > 2) for folder in large(day)), day
        assert all(folder.exists() == (number > 1) for folder in weights(day, number)), day
        assert (plan.out / "runs" / day / "evaluation-test.json").exists()
    assert plan.champion(9).exists()


def test_the_help_names_every_key() -> None:
    text = CliRunner().invoke(app, ["daily", "--help"]).output
    assert not [field.name for field in fields(DailySettings) if field.name not in text]
