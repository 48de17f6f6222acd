"""What a run folder may be used for: claimed once, continued, trained on when more is asked for, and usable
again after a full disk."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from data_shards.checksum import file_sha256
from data_shards.settings import read_yaml
from tests.integration.test_train import BASE
from tests.tiny_folder import make_tiny_folder
from tests.unit.test_files import small_disk  # noqa: F401 (a fixture)
from trainer import cli
from trainer.config import Config
from trainer.configs import load_config
from trainer.data.folder import PreparedFolder
from trainer.errors import ConfigError, EnvironmentProblem, RunError
from trainer.experiments.submit import check_folder
from trainer.runs import agreement, weights
from trainer.runs import claim as claim_module
from trainer.runs.claim import holds_run
from trainer.runtime.files import SECRET_MODE, create
from trainer.tracking import also
from trainer.training.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny") / "data", num_train=48, num_valid=12)


def config_of(data: Path, run_dir: Path, *overrides: str) -> Config:
    return load_config(None, [f"data.dir={data}", f"run.dir={run_dir}", *BASE, "run.max_steps=2", *overrides])


def test_a_finished_run_is_trained_on_when_more_steps_are_accepted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(config_of(data, run_dir)).step == 2
    more = config_of(data, run_dir, "run.max_steps=4")
    with pytest.raises(RunError, match=r"run\.accept_changes=run\.max_steps"):
        train(more, resume="auto")
    accepted = config_of(data, run_dir, "run.max_steps=4", "run.accept_changes=run.max_steps")
    check_folder(accepted)  # gensr submit takes it, too
    result = train(accepted, resume="auto")
    assert (result.status, result.step) == ("finished", 4)
    assert read_yaml(run_dir / "config.yaml")["run"]["max_steps"] == 4
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if record["kind"] == "train"] == [1, 2, 3, 4]

    with pytest.raises(RunError, match="has finished"):
        check_folder(accepted)
    words = ["train", str(run_dir / "config.yaml"), "--resume", "auto"]
    monkeypatch.setattr("sys.argv", ["gensr", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert f"{run_dir}: already finished at step 4, nothing was trained" in capsys.readouterr().err


def test_a_finished_run_without_checkpoints_is_not_begun_again(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(config_of(data, run_dir))
    (run_dir / "checkpoints").rename(tmp_path / "moved")
    with pytest.raises(RunError, match="holds no checkpoint"):
        train(config_of(data, run_dir, "run.max_steps=4", "run.accept_changes=run.max_steps"), resume="auto")


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_an_empty_configuration_claims_nothing(data: Path, tmp_path: Path, resume: Any) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").touch()
    (run_dir / ".config.yaml.123.tmp").write_text("half of")
    assert not holds_run(run_dir)
    assert train(config_of(data, run_dir, "run.max_steps=1"), resume).status == "finished"
    assert holds_run(run_dir) and not (run_dir / ".config.yaml.123.tmp").exists()


def test_a_claim_on_a_full_disk_leaves_nothing(data: Path, small_disk: Path) -> None:  # noqa: F811
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(b"x" * 1_000_000)
    config = config_of(data, small_disk / "run")
    for _ in range(2):
        with pytest.raises(EnvironmentProblem, match="No space left on device"):
            train(config)
    filler.unlink()
    assert not list((small_disk / "run").glob("*"))


def test_a_tracker_that_does_not_start_leaves_no_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, config: Config, run_dir: Path) -> None:
        (run_dir / "tensorboard").mkdir()
        (run_dir / "tracking-spool.jsonl").touch()
        raise EnvironmentProblem("tracking.also: failed to start")

    monkeypatch.setattr(also, "check_packages", lambda config: None)
    monkeypatch.setattr(also, "start", refused)
    with pytest.raises(EnvironmentProblem, match="failed to start"):
        train(config_of(data, tmp_path / "run", "tracking.also=tensorboard"))
    assert not (tmp_path / "run").exists()


def _create(path: Path, number: int, barrier: Any, answers: Any) -> None:
    barrier.wait()
    answers.put((number, create(path, f"run {number}\n", SECRET_MODE)))


def test_a_run_that_does_not_begin_leaves_what_was_there(data: Path, tmp_path: Path) -> None:
    """--resume auto, as jobs have it, begins in a folder that is not empty, too."""
    theirs = [tmp_path / name for name in ("metrics.jsonl", "wandb/run-1/run.log", "tensorboard/events")]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of another program")
    with pytest.raises(ConfigError, match="num_heads"):
        train(config_of(data, tmp_path, "model.num_heads=3"), resume="auto")
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(theirs)


def test_only_one_of_several_creates_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    runs = [context.Process(target=_create, args=(tmp_path / "f", n, barrier, answers)) for n in range(4)]
    for run in runs:
        run.start()
    outcome = dict(answers.get(timeout=60) for _ in runs)
    winner = [number for number, made in outcome.items() if made]
    assert len(winner) == 1 and (tmp_path / "f").read_text() == f"run {winner[0]}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_full_disk_while_the_model_is_written_is_a_failure_to_mend(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    run_dir = tmp_path / "run"
    with pytest.raises(
        EnvironmentProblem, match=rf"{run_dir}/model: cannot be written: No space.*Free space"
    ):
        train(config_of(data, run_dir))
    assert json.loads((run_dir / "status.json").read_text())["status"] == "failed"


def test_a_run_folder_that_another_node_does_not_see_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, and the folder is as it was."""
    told: list[Any] = []

    def two_nodes(accelerator: Any, mine: Any) -> list[Any]:
        told.append(mine)
        return [mine, (False, "node2")]

    with monkeypatch.context() as patch:
        patch.setattr(claim_module, "gather_objects", two_nodes)
        with pytest.raises(RunError, match=r"run is not seen on node2\. Choose a run\.dir"):
            train(config_of(data, tmp_path / "run"))
    assert [is_seen for is_seen, _ in told] == [True] and not (tmp_path / "run").exists()
    assert not claim_module._appears(tmp_path / "run" / "config.yaml", 0.1)
    assert train(config_of(data, tmp_path / "run")).step == 2


def test_another_metric_picks_among_its_own_values(data: Path, tmp_path: Path) -> None:
    """Of the best step so far, too: a recall that no NDCG reaches would keep RUN/model as it is for ever."""
    run_dir = tmp_path / "run"
    train(config_of(data, run_dir, "run.select_metric=mean/recall@20"))
    changed = ["run.max_steps=4", "run.select_metric=mean/ndcg@5"]
    accepted = "run.accept_changes=run.max_steps,run.select_metric"
    train(config_of(data, run_dir, *changed, accepted), resume="auto")
    progress = json.loads((run_dir / "status.json").read_text())["progress"]
    assert progress["best_value"] == progress["best_metrics"]["mean/ndcg@5"]


def test_processes_that_were_started_in_another_way_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed on each node, they would train two runs and average their gradients. Where a node keeps its data,
    and how many hands it has, is its own."""
    others: list[dict[str, Any]] = [{}, {"run.seed": 7, "prepared folder": "another", "CF table": "older"}]

    def two_nodes(accelerator: Any, mine: Any) -> list[Any]:
        return [mine, *(("node2", mine[1] | other) for other in others)]

    monkeypatch.setattr(agreement, "gather_objects", two_nodes)
    with pytest.raises(RunError, match=r"rank 0 on .* and rank 2 on node2 have") as refused:
        train(config_of(data, tmp_path / "run"))
    assert " and another\n" in str(refused.value)
    table = file_sha256(data / "cf" / "lightgcn.safetensors")
    assert f"\n  CF table: {table[:16]} and older\n" in str(refused.value)
    assert "\n  run.seed: 0 and 7\n" in str(refused.value)
    assert not (tmp_path / "run").exists()
    told: list[Any] = []

    def earlier_ones_too(accelerator: Any, mine: Any) -> list[Any]:
        told.append(mine)
        return told

    monkeypatch.setattr(agreement, "gather_objects", earlier_ones_too)
    for own in ("run.threads=1", "run.threads=2", "data.num_workers=1"):
        config = config_of(data, tmp_path / own, own)
        agreement.check_agreement(None, config, PreparedFolder.at(data))
