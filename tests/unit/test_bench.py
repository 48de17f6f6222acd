"""`gensr bench`: the measured processes, the object for scripts, and that both preparations find the same
events."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tiny_folder import make_tiny_folder
from trainer.bench import data as bench
from trainer.bench import micro_batch
from trainer.bench import model as bench_model
from trainer.cli import app
from trainer.errors import BenchError, ConfigError
from trainer.runtime import device

KEYS = {
    "prepare_ratio_to_duckdb",
    "prepare_peak_rss_bytes",
    "loader_examples_per_s_per_core",
    "loader_ratio_to_per_example",
    "loader_rss_bytes",
}


def test_a_process_is_measured_with_its_memory() -> None:
    program = "import json; x = b'x' * 300_000_000; print('noise'); print(json.dumps({'a': 1}))"
    measured = bench.measure([sys.executable, "-c", program], threads=1)
    assert measured.answer == {"a": 1}
    assert measured.peak_rss_bytes > 300_000_000 and measured.cpu_s > 0 and measured.wall_s > 0


def test_a_failing_process_is_named_with_its_last_words() -> None:
    with pytest.raises(BenchError, match="exit code 3: no such thing"):
        bench.measure(
            [sys.executable, "-c", "import sys; sys.stderr.write('first\\nno such thing\\n'); sys.exit(3)"],
            threads=1,
        )


def test_wrong_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="20000 or more"):
        bench.bench_data([100], folder=tmp_path)
    assert isinstance(CliRunner().invoke(app, ["bench", "data", "--rows", "many"]).exception, ConfigError)
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="checkout"):
        bench.bench_data([20_000])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_whole_of_it_at_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few items, so that the 5-core keeps some."""
    monkeypatch.setattr(bench, "ITEMS", 800_000)
    result = CliRunner().invoke(
        app,
        [
            "bench",
            "data",
            "--rows",
            "20000,40000",
            "--turns",
            "1",
            "--seconds",
            "0.2",
            "--folder",
            str(tmp_path),
            "--json",
        ],
        catch_exceptions=False,
    )
    document = json.loads(result.stdout.splitlines()[-1])
    assert set(document) >= KEYS | {"hardware", "commit", "configuration", "scaling"}
    small, large = document["scaling"]
    assert (
        large["rows"] == pytest.approx(2 * small["rows"], rel=0.2) and large["events"] > small["events"] > 0
    )
    assert small["loader_rss_bytes"] > 0 and large["loader_rss_bytes"] < 300e6
    assert document["loader_ratio_to_per_example"] > 20 and document["loader_rss_bytes"] < 300e6
    assert any("distinct users" in line for line in bench.bench_lines(document))


def test_bench_of_the_model_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(
        ConfigError, match=r"--pairs must be a multiple of 1 \+ data\.num_negatives = 5, got 7"
    ):
        bench_model.bench_model("train", pairs=7)
    with pytest.raises(ConfigError, match=r"model\.backbone=google/flan-t5-base.*scratch:flan_t5_base"):
        bench_model.bench_model("evaluate", ["model.backbone=google/flan-t5-base"])


def test_a_gpu_is_given_enough_and_the_reference_the_papers_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    assert bench_model.default_pairs("train") == (20, 20)
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    for mode, candidates in (("train", 5), ("evaluate", 100)):
        ours, references = bench_model.default_pairs(mode)  # type: ignore[arg-type]
        assert ours > references == 200 and ours % candidates == references % candidates == 0


@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_steps_and_scoring_beside_the_reference(tmp_path: Path) -> None:
    folder = bench_model.synthetic_folder(tmp_path, 1, lambda stage, done, total: None)
    arguments = [
        f"data.dir={folder}",
        "model.backbone=scratch:nano",
        "--pairs",
        "5",
        "--steps",
        "1",
        "--turns",
        "1",
        "--threads",
        "1",
        "--json",
    ]
    trace = tmp_path / "trace.json"
    train, evaluate = (
        json.loads(
            CliRunner()
            .invoke(app, ["bench", mode, *arguments, *more], catch_exceptions=False)
            .stdout.splitlines()[-1]
        )
        for mode, more in (("train", ["--profile", str(trace)]), ("evaluate", []))
    )
    assert set(train) >= {
        "examples_per_s",
        "ratio_to_reference",
        "mfu",
        "peak_memory_bytes",
        "step_s",
        "commit",
        "hardware",
        "configuration",
    }
    assert train["mfu"] is None and set(train["step_s"]) == {
        "data",
        "forward",
        "backward",
        "optimiser",
        "communication",
    }
    assert (
        set(evaluate) >= {"candidates_per_s", "ratio_to_reference", "commit", "hardware", "configuration"}
        and evaluate["candidates_per_s"] > 0
    )
    assert 60 < train["prompt_tokens"] < 130, "about as long as flan-t5's tokenizer makes it"
    assert json.loads(trace.read_text())["traceEvents"]
    assert all(
        any(word in line for line in bench_model.bench_model_lines(train))
        for word in ("ratio", "backward", "reference")
    )


def test_the_fastest_micro_batch_is_found_and_memory_is_not_exhausted_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device of 10 GB, where a size takes 1 GB and 0.5 GB an event more: 32 would not fit, and is not
    tried."""
    speed = {1: 10.0, 2: 18.0, 4: 30.0, 8: 40.0, 16: 40.5}
    tried = []

    def measured(request: dict[str, Any], threads: int) -> bench.Measured:
        size = int(request["overrides"][-1].removeprefix("optim.micro_batch_size="))
        tried.append(size)
        memory = 1_000_000_000 + 500_000_000 * size
        answer = {
            "events_per_s": speed[size],
            "peak_memory_bytes": memory,
            "calculated_memory_bytes": memory,
            "device_memory_bytes": 10_000_000_000,
            "device": "1 × CPU",
        }
        return bench.Measured(1.0, 1.0, memory, answer)

    monkeypatch.setattr(micro_batch, "_measured", measured)
    document = micro_batch.bench_micro_batch(None, ["data.dir=x", "optim.global_batch_size=64"])
    assert tried == [1, 2, 4, 8, 16] and document["best"] == 8, "16 gains less than 2 %"
    assert document["tried"][-1] == {"micro_batch_size": 32, "stopped": "would take 17.0 GB"}
    assert "optim.micro_batch_size=8" in "\n".join(micro_batch.bench_micro_batch_lines(document))

    speed |= {4: 10.0}
    tried.clear()
    assert micro_batch.bench_micro_batch(None, ["data.dir=x", "optim.global_batch_size=64"])[
        "best"
    ] == 2 and tried == [1, 2, 4], "slower: no more"

    stopped = bench.Measured(1.0, 1.0, 1, {"stopped": "out of memory: the device has 1 GB"})
    monkeypatch.setattr(micro_batch, "_measured", lambda *_: stopped)
    with pytest.raises(BenchError, match="not even one event fits: out of memory"):
        micro_batch.bench_micro_batch(None, ["data.dir=x"])
    with pytest.raises(ConfigError, match=r"data\.dir=OUT"):
        micro_batch.bench_micro_batch(None, [])


@pytest.mark.long
def test_micro_batches_are_tried_with_the_steps_of_a_training(tmp_path: Path) -> None:
    make_tiny_folder(tmp_path / "data")
    settings = [
        f"data.dir={tmp_path / 'data'}",
        "model.backbone=scratch:nano",
        "optim.global_batch_size=2",
        "model.lora.rank=2",
    ]
    result = CliRunner().invoke(app, ["bench", "micro-batch", *settings, "--steps", "1", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])["tried"]
    assert [row["micro_batch_size"] for row in rows] == [1, 2]
    assert all(row["events_per_s"] > 0 and row["peak_memory_bytes"] > 1e8 for row in rows)
