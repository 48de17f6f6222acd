"""gensr submit without a cluster: what is checked before anything queues, what stands in the script, what
sbatch is told. sweeps, too."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards.settings import to_yaml
from tests.tiny_folder import make_tiny_folder
from trainer.configs import load_config
from trainer.errors import ConfigError, EnvironmentProblem, GensrError, RunError
from trainer.experiments import submit as jobs
from trainer.experiments import sweep
from trainer.experiments.submit import Machines, Submission
from trainer.experiments.sweep import read_sweep, summarize

SETTINGS = [
    "model.backbone=scratch:nano",
    "data.item_tokens=8",
    "data.history_tokens=4",
    "optim.global_batch_size=16",
    "optim.micro_batch_size=4",
]
TWO_NODES = Machines(nodes=2, gpus_per_node=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("prepared") / "data")


@pytest.fixture
def plan(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Submission]:
    """plan_run in a folder of its own, with settings that are right but for the given ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GENSR_ENV", raising=False)

    def run(*more: str, machines: Machines = TWO_NODES, options: tuple[str, ...] = ()) -> Submission:
        return jobs.plan_run(
            "demo",
            [f"data.dir={data}", "run.dir=runs/a b", *SETTINGS, *more],
            machines,
            options,
            "gensr submit …",
        )

    return run


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Stand-ins that remember their calls: sbatch answers 101, 102, …; squeue knows job 101 as long as the
    file `queued` is there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sbatch": f'echo "$*" >> {folder}/calls; [[ $* != *--qos=none* && ! -e {folder}/refuse ]] || '
        '{ echo "Invalid qos" >&2; exit 1; }\n'
        f"echo $((100 + $(wc -l < {folder}/calls)))",
        "squeue": f"[[ $* == *101* && -e {folder}/queued ]] && echo PENDING",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return lambda: (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def arguments_of(script: str, task: str = "") -> list[str]:
    """What the script's own `set --` gives it: bash reads everything before the body's first function."""
    head = script.split("\nsay() {")[0].split("\nSRUN_ARGS")[0]
    command = f"{head}\nprintf '%s\\n' \"$@\""
    done = subprocess.run(
        ["bash", "-c", command], env={"SLURM_ARRAY_TASK_ID": task}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_script_is_the_packages_with_this_runs_words(plan: Callable[..., Submission], data: Path) -> None:
    submission = plan("run.seed=1", options=("--account=A", "--time=12:00:00", "--exclusive"))
    (job,) = submission.jobs
    directives = [line for line in job.text.splitlines() if line.startswith("#SBATCH")]
    for wanted in (
        "--nodes=2",
        "--gpus-per-node=2",
        "--account=A",
        "--time=12:00:00",
        "--exclusive",
        "--requeue",
        f"--chdir={Path.cwd()}",
    ):
        assert f"#SBATCH {wanted}" in directives
    assert len([line for line in directives if "--time" in line]) == 1
    assert arguments_of(job.text) == ["demo", f"data.dir={data}", "run.dir=runs/a b", *SETTINGS, "run.seed=1"]
    body = (Path(__file__).parents[2] / "slurm" / "train.sbatch").read_text().split("--output=%x-%j.out\n")[1]
    assert job.text.endswith(body)
    assert str(Path(sys.executable).parent) in job.text  # no slurm/env.sh here: the Python that submitted
    assert job.path == Path("runs/a b/train.sbatch") and not Path("runs").exists()
    assert any("4 processes on 2 nodes" in line for line in submission.plan_lines)


@pytest.mark.parametrize(
    ("more", "machines", "message"),
    [
        (["optim.learning_rate=1"], TWO_NODES, "optim.learning_rate"),
        (["optim.micro_batch_size=16"], TWO_NODES, "16"),  # of 16 events on 4 processes
        (["data.dir=nothing"], TWO_NODES, "nothing"),
        (["data.dir="], TWO_NODES, "data.dir=OUT"),
        ([], Machines(deepspeed="zero7.json"), "zero7.json"),
        (["run.dir="], TWO_NODES, "run.dir"),
    ],
)
def test_mistakes_do_not_queue(
    plan: Callable[..., Submission], more: list[str], machines: Machines, message: str
) -> None:
    with pytest.raises(GensrError, match=message):
        plan(*more, machines=machines)


def test_a_run_folder_that_a_file_names_is_the_scripts_too(data: Path, tmp_path: Path) -> None:
    """As of `gensr submit RUN/config.yaml`: the script reads status and checkpoints there."""
    config = load_config("demo", [f"data.dir={data}", f"run.dir={tmp_path / 'a b'}", *SETTINGS])
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(config))
    job = jobs.plan_run(str(file), [], TWO_NODES, (), "gensr submit …").jobs[0]
    assert arguments_of(job.text) == [str(file), f"run.dir={tmp_path / 'a b'}"]


def test_a_folder_with_another_run_or_a_job_is_refused(
    plan: Callable[..., Submission], sbatch: Callable[[], list[str]], tmp_path: Path
) -> None:
    assert jobs.submit(plan()) == ["101"]
    assert sbatch() == ["--parsable runs/a b/train.sbatch"]
    (tmp_path / "bin" / "queued").touch()
    with pytest.raises(RunError, match="101 is PENDING"):
        plan()
    (tmp_path / "bin" / "queued").unlink()
    folder = Path("runs/a b")
    (folder / "config.yaml").write_text(
        to_yaml(load_config("demo", ["run.dir=runs/a b", *SETTINGS, "optim.lr=7e-3"]))
    )
    with pytest.raises(RunError, match=r"optim\.lr"):
        plan()
    plan("optim.lr=7e-3")  # continues that run
    (folder / "status.json").write_text('{"status": "finished"}')
    with pytest.raises(RunError, match="finished"):
        plan("optim.lr=7e-3")


def test_without_sbatch_and_where_it_refuses(
    plan: Callable[..., Submission], sbatch: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = plan().jobs
    with pytest.raises(EnvironmentProblem, match="Invalid qos"):
        jobs.submit(Submission([jobs.Job(job.path, job.text, flags=("--qos=none",))], []))
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EnvironmentProblem, match="login node"):
        jobs.submit(plan())
    assert not Path("runs/a b/job.json").exists()


def test_a_controller_that_does_not_answer(
    plan: Callable[..., Submission], sbatch: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job may be there all the same."""
    submission = plan()
    monkeypatch.setattr(jobs, "SBATCH_S", 0.2)
    (Path(shutil.which("sbatch") or "")).write_text("#!/usr/bin/env bash\nexec sleep 20\n")
    with pytest.raises(EnvironmentProblem, match=r"no answer within 0\.2 s\. Look with squeue --me"):
        jobs.submit(submission)


def test_words_are_settings_or_options_of_sbatch() -> None:
    assert jobs.split_words(["a.b=1", "--time=1:00", "--exclusive"]) == (
        ["--time=1:00", "--exclusive"],
        ["a.b=1"],
    )
    for wrong in (["--account", "A"], ["-A"], ["word"]):
        with pytest.raises(ConfigError, match="--name=value"):
            jobs.split_words(wrong)
    for twice in ("--gres=gpu:a100:8", "--gpus=8", "--gpus-per-task=1"):
        with pytest.raises(ConfigError, match="--gpus-per-node NUMBER, or TYPE:NUMBER"):
            jobs.split_words([twice, "--gres-flags=enforce-binding"])


def test_gpus_of_a_type(plan: Callable[..., Submission]) -> None:
    """A cluster of several types gives any, or none, where none is named. sbatch refuses GPUs given twice."""
    kind, number = jobs.read_gpus("a100:2")
    job = plan(machines=Machines(2, number, gpu_type=kind)).jobs[0]
    assert "#SBATCH --gpus-per-node=a100:2\n" in job.text
    assert Machines(gpu_type="a100").gpus(1) == {"gpus-per-node": "a100:1"}
    assert jobs.read_gpus("0") == ("", 0)
    for wrong in ("many", "a100", "a100:", "-1", ":2"):
        with pytest.raises(ConfigError, match="such as 8 or a100:8"):
            jobs.read_gpus(wrong)


# ---- sweeps ------------------------------------------------------------------------------------------------


def test_a_sweep_is_an_array_then_its_evaluation_then_the_table(
    data: Path, sbatch: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(
        "- {optim.lr: 3e-4}\n- {optim.lr: 0.001, model: {gather_negatives: true, dropout: 0.2}}\n"
    )
    points = read_sweep("sweep.yaml")
    assert [point.overrides for point in points] == [
        ("optim.lr=3e-4",),
        ("optim.lr=0.001", "model.gather_negatives=true", "model.dropout=0.2"),
    ]
    settings = [f"data.dir={data}", "run.dir=runs/s", *SETTINGS]
    submission = jobs.plan_sweep(
        "demo", settings, points, TWO_NODES, ["--account=A", "--time=1"], "gensr submit …", parallel=1
    )
    train, evaluate, summary = (job.text for job in submission.jobs)
    assert (
        "#SBATCH --array=0-1%1" in train
        and "#SBATCH --time=1\n" in train
        and "#SBATCH --account=A" in summary
        and "--time=1\n" not in evaluate
    )
    assert arguments_of(train, "1") == [
        "demo",
        f"data.dir={data}",
        *SETTINGS,
        *points[1].overrides,
        f"run.dir=runs/s/{points[1].name}",
    ]
    assert arguments_of(evaluate, "0") == ["runs/s/00-lr-3e-4"]
    assert arguments_of(summary) == ["runs/s"]
    assert jobs.submit(submission) == ["101", "102", "103"]
    assert [call.removeprefix("--parsable ").split(" runs/")[0] for call in sbatch()[1:]] == [
        "--dependency=aftercorr:101 --kill-on-invalid-dep=yes",
        "--dependency=afterany:101:102",
    ]
    assert json.loads(Path("runs/s", points[1].name, "job.json").read_text()) == {"job_id": "101_1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "must be a list"),
        ("[]", "must be a list"),
        ("- [1]", "must be a list"),
        ("- {a: 1}\n- {a: 1}", "the same"),
        ("- {run.dir: x}", "run.dir"),
        ("- {", "not a readable"),
    ],
)
def test_bad_sweep_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_sweep(tmp_path / "s.yaml")


def test_the_table_of_a_sweep_names_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags: dict[str, str] = {}
    monkeypatch.setattr(sweep, "adopt_runs", lambda *_, **given: tags.update(given["tags"]) or "")
    with pytest.raises(RunError, match="has started"):
        summarize(tmp_path)
    for name, status, best in (("00-a", "finished", 0.3), ("01-b", "finished", 0.5), ("02-c", "failed", 0.6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(to_yaml(load_config(None, [f"run.dir={name}"])))
        (tmp_path / name / "status.json").write_text(
            json.dumps({"status": status, "progress": {"step": 9, "best_step": 5, "best_value": best}})
        )
    (tmp_path / "03-d").mkdir()
    (tmp_path / "03-d" / "job.json").write_text('{"job_id": "1_3"}')
    document = summarize(tmp_path)
    assert [(row["run"], row["status"]) for row in document["runs"]] == [
        ("02-c", "failed"),
        ("01-b", "finished"),
        ("00-a", "finished"),
        ("03-d", "not started"),
    ]
    table = (tmp_path / "sweep.txt").read_text()
    assert table.index("02-c") < table.index("01-b") < table.index("00-a")
    assert document["runs"][-1]["best"] is None and "  03-d  –       step 0 of 0  not started" in table
    assert tags["best_run"] == "01-b"  # the failed one, which was ahead, is nobody's choice


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (("tracking.run_name=a\ntouch broken",), ()),
        ((), ("--comment=a\ntouch broken",)),
        (("tracking.run_name=a\rb",), ()),
        (("tracking.run_name=a\u2028b",), ()),
    ],
)
def test_control_characters_never_reach_a_script(
    plan: Callable[..., Submission], settings: tuple[str, ...], options: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match="control character"):
        plan(*settings, options=options)


def test_a_command_line_stays_in_its_comment() -> None:
    with pytest.raises(ConfigError, match="control character"):
        jobs.job_script("train", [["demo"]], {}, jobs.Machines(), "gensr submit 'x\ntouch broken'")


def test_options_with_spaces_stay_one_word(plan: Callable[..., Submission], tmp_path: Path) -> None:
    text = plan(options=("--comment=two words # and more",)).jobs[0].text
    assert "#SBATCH '--comment=two words # and more'" in text
    assert f"#SBATCH '--output={tmp_path}/runs/a b/%x-%j.out'" in text
    assert "#SBATCH --nodes=2" in text


def test_a_percent_sign_of_a_folder_is_no_pattern_of_sbatch(plan: Callable[..., Submission]) -> None:
    """%j would be the job's number: there is no such folder, and the job would fail without a word."""
    text = plan("run.dir=runs/50%j").jobs[0].text
    assert "/runs/50%%j/%x-%j.out\n" in text
