"""The demo's steps at a hundredth of its size: two processes, ZeRO-2, evaluation, registry; and that it
can be called again."""

import json
import shlex
from pathlib import Path

import pytest

from trainer import demo
from trainer.errors import RunError
from trainer.evaluation.summary import read_evaluation
from trainer.tracking.store import connect

PRESET = """
model: {backbone: "scratch:mini"}
data: {history_max: 10}
optim: {global_batch_size: 16, micro_batch_size: 8, warmup_steps: 2}
run: {max_steps: 4, valid_events: 20, log_every_steps: 2, validate_every_steps: 4}
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(PRESET)
    for name, value in {"USERS": 60, "ITEMS": 250, "DAYS": 5, "PRESET": str(tmp_path / "tiny.yaml")}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "PREPARE", ("min_interactions=1", "both_behaviours=false", "vocab_size=400"))
    monkeypatch.setattr(demo, "CF", ("cf.max_epochs=2", "cf.dim=16"))
    monkeypatch.setattr(demo, "MODEL_NAME", "gensr-demo-test")
    return tmp_path


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_demo_end_to_end_and_again(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data_dir, run_dir = small / "data" / "demo", small / "runs" / "demo"
    demo.run_demo(data_dir, run_dir)
    screen = capfd.readouterr().out
    for text in (
        "  GenSR  ",
        "popularity",
        "LightGCN",
        "BM25",
        "planted optimum",
        "recall@10",
        "ndcg@5",
        str(run_dir / "report"),
        "models:/gensr-demo-test/1",
        "mlflow ui --backend-store-uri",
    ):
        assert text in screen
    user, query = demo.a_search(data_dir)
    assert (
        f"gensr search models:/gensr-demo-test@candidate --query {shlex.quote(query)} --user {user}" in screen
    )
    assert f"gensr recommend models:/gensr-demo-test@candidate --user {user}" in screen
    assert query[0].isalpha() and len(query.split()) > 1  # words, as a user would type them
    assert json.loads((data_dir / "optimum.json").read_text())["rec"]["num_events"] > 0
    assert len(list((run_dir / "report").glob("*.png"))) == 2
    evaluation = read_evaluation(run_dir)
    assert evaluation["protocol"]["num_processes"] == 2
    assert set(evaluation["baselines"]) == {"popularity", "lightgcn", "lightgcn_history", "bm25"}

    registered = json.loads((run_dir / "registry.json").read_text())
    client = connect(registered["uri"])
    runs = client.search_runs([client.get_experiment_by_name("gensr").experiment_id])
    assert [run.info.run_id for run in runs] == [registered["run_id"]]  # one run a job, not one a rank
    run = runs[0]
    assert run.info.status == "FINISHED"
    assert [p.step for p in client.get_metric_history(run.info.run_id, "train/loss")] == [2, 4]
    assert run.data.metrics["train/events_per_s"] > 0
    assert run.data.metrics["test/rec/ndcg_at_10"] == pytest.approx(evaluation["rec"]["ndcg@10"])
    assert run.data.params["optim.micro_batch_size"] == "8"
    assert run.inputs.dataset_inputs[0].dataset.digest == evaluation["protocol"]["manifest_hash"][:36]

    (run_dir / "registry.json").unlink()  # as if interrupted before the last step
    demo.run_demo(data_dir, run_dir)
    again = capfd.readouterr().out
    assert again.count("done before") == 6
    assert "models:/gensr-demo-test/1" in again  # the version is completed, not made twice


def test_a_failing_launch_is_reported(small: Path) -> None:
    with pytest.raises(RunError, match="exit code 1"):
        demo.launch(1, ["inspect", str(small / "nothing")])


def test_devices_follow_the_machine(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    # an earlier test of this process may have trained on CPU
    for name in ("DS_ACCELERATOR", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert demo.devices(demo.PRESET, []) == (2, ["optim.micro_batch_size=8"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert demo.devices(demo.PRESET, []) == (4, ["optim.micro_batch_size=4", "run.precision=bf16"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert demo.devices(demo.PRESET, [])[0] == 2


def test_is_newer(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    assert not demo.is_newer(new, old)
    old.write_text("")
    assert not demo.is_newer(new, old)
    new.write_text("")
    assert demo.is_newer(new, old)
