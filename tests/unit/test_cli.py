"""The command as people and scripts meet it: help, exit codes, messages, JSON, ranks, and what the wheel
holds."""

import gc
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from data_shards.prepare import prepare
from tests.tiny_folder import make_tiny_folder
from trainer.cli import app, main
from trainer.cli.base import fitting, lacking, quoted, resumable
from trainer.config import Config
from trainer.configs import load_config
from trainer.errors import ConfigError
from trainer.models.zoo import model_class
from trainer.training.plan import dry_run

ROOT = Path(__file__).parents[2]
SHIPPED = (".py", ".typed", ".yaml", ".json", ".md", ".sbatch", ".sh")
VERBS = [
    "simulate",
    "download",
    "prepare",
    "inspect",
    "optimum",
    "cf",
    "train",
    "submit",
    "evaluate",
    "report",
    "compare",
    "table",
    "sweep",
    "daily",
    "analyse",
    "paper",
    "register",
    "promote",
    "score",
    "recommend",
    "search",
    "serve",
    "ui",
    "doctor",
    "demo",
]
COMMANDS = [[verb] for verb in VERBS] + [
    ["bench", "data"],
    ["bench", "train"],
    ["bench", "evaluate"],
    ["bench", "micro-batch"],
    ["runs", "summarize"],
    ["runs", "import"],
    ["config", "show"],
    ["config", "keys"],
    ["config", "schema"],
]


def gensr(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "150", **environment},
        cwd=ROOT,
    )


def test_every_verb_is_known() -> None:
    command = typer.main.get_command(app)
    assert set(command.commands) == {*VERBS, "bench", "config", "runs"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example_that_parses(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    example = next(
        line.strip() for line in result.output.splitlines() if line.strip().startswith("Example: gensr ")
    )
    assert example.split()[2 : 2 + len(command)] == command


@pytest.mark.parametrize("group", ["", "bench", "config", "runs"])
def test_lists_of_verbs_do_not_break_lines_where_the_source_does(group: str) -> None:
    verbs: Any = typer.main.get_command(app)
    if group:
        verbs = verbs.commands[group]
    listed = CliRunner().invoke(app, [*group.split(), "--help"], env={"COLUMNS": "300"}).output
    for verb in verbs.commands.values():
        about = inspect.cleandoc((verb.callback and verb.callback.__doc__) or verb.help).split("\n\n")[0]
        assert " ".join(about.split()) in listed


def test_one_error_without_a_traceback_and_its_traceback_with_debug() -> None:
    done = gensr("config", "show", "optim.learning_rate=1", "run.max_steps=-3")
    assert done.returncode == 1
    assert "2 problems" in done.stderr
    assert "optim.learning_rate" in done.stderr
    assert "run.max_steps" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    debug = gensr("config", "show", "run.max_steps=-3", "--debug")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train"], ["evaluate", "runs/none", "--wrong"], ["inspect", "/nonexistent"]],
    ids=" ".join,
)
def test_failures_end_with_1(arguments: list[str]) -> None:
    assert gensr(*arguments).returncode == 1


def test_only_rank_0_speaks() -> None:
    assert gensr("config", "show", RANK="0").stdout
    assert gensr("config", "show", RANK="1").stdout == ""
    wrong = gensr("config", "show", "no.such=1", RANK="1")
    assert (wrong.returncode, wrong.stderr) == (1, "")
    assert gensr("inspect", "/nonexistent", RANK="1").stderr.startswith("gensr: rank 1: ")


def test_config_show_can_be_trained_from(tmp_path: Path) -> None:
    shown = gensr("config", "show", "optim.lr=3e-4", "data.dir=OUT").stdout
    file = tmp_path / "config.yaml"
    file.write_text(shown)
    assert load_config(str(file)) == load_config(None, ["optim.lr=3e-4", "data.dir=OUT"])
    assert yaml.safe_load(shown)["optim"]["lr"] == 3e-4


def test_config_keys_explains_every_key() -> None:
    document = json.loads(gensr("config", "keys", "--json").stdout)
    assert set(document) == {"train", "cf", "prepare"}
    for rows in document.values():
        assert [row["key"] for row in rows if not row["help"]] == []
    defaults = {row["key"]: row["default"] for row in document["train"]}
    assert defaults["optim.lr"] == Config().optim.lr
    assert "optim.lr=0.001" in gensr("config", "keys", "train").stdout
    assert gensr("config", "keys", "nothing").returncode == 1
    assert "Did you mean sasrec?" in gensr("config", "keys", "sasrecc").stderr
    assert "gensr config show demo" in gensr("config", "keys", "demo").stderr


def test_config_keys_says_what_a_key_takes() -> None:
    result = CliRunner().invoke(app, ["config", "keys", "--json"])
    takes = {row["key"]: row["allowed"] for row in json.loads(result.stdout)["train"]}
    assert takes["data.negatives"] == "uniform, popularity, impressions, mixture"
    assert takes["optim.beta2"] == "> 0 and < 1"
    assert takes["optim.micro_batch_size"] == "whole number > 0"
    assert takes["tracking.enabled"] == "true or false"
    assert takes["data.dir"] == ""
    lines = CliRunner().invoke(app, ["config", "keys", "train"], env={"COLUMNS": "80"}).stdout.splitlines()
    assert max(map(len, lines[: lines.index("Presets")])) <= 80
    assert "scientific_small" in " ".join(lines[lines.index("Presets") :])


@pytest.mark.parametrize("source", ["amazon", "tables"])
def test_help_of_prepare_lists_the_settings_of_a_source(source: str) -> None:
    listed = CliRunner().invoke(app, ["prepare", source, "--help"]).output
    rule = "leave_one_out" if source == "amazon" else "time"
    assert f"  split={rule} " in listed and "[time, leave_one_out]" in " ".join(listed.split())
    assert ("  text_order=" in listed) == (source == "amazon")
    unisar = CliRunner().invoke(app, ["prepare", "unisar", "--help"]).output
    assert "[stored, time, leave_one_out]" in " ".join(unisar.split())
    assert "Settings of" not in CliRunner().invoke(app, ["prepare", "--help"]).output


def test_flags_have_no_type_and_there_is_completion() -> None:
    text = CliRunner().invoke(app, ["-h"]).output + CliRunner().invoke(app, ["evaluate", "--help"]).output
    assert "<bool>" not in text and "--show-completion" in text and "--no-baselines" in text
    assert CliRunner().invoke(app, ["--version"]).output.startswith("gensr 0.")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("gensr ev", ["evaluate"]),
        ("gensr train scientific_", ["scientific_paper", "scientific_small"]),
        ("gensr train demo optim.l", ["optim.lr="]),
        ("gensr train demo data.dir\n=\nda", []),  # bash splits at =; files are the shell's own
        ("gensr cf data/mine cf.d", ["cf.dim="]),
        ("gensr prepare am", ["amazon"]),
        ("gensr prepare tables RAW OUT utc", ["utc_offset_hours="]),
        ("gensr config show sas", ["sasrec"]),
        ("gensr compare a b --candidates h", ["hard"]),
    ],
)
def test_bash_completes(typed: str, expected: list[str]) -> None:
    words = typed.split()
    asked = {"_GENSR_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words)}
    asked["COMP_CWORD"] = str(len(words) - 1)
    shown = CliRunner().invoke(app, [], env=asked, prog_name="gensr")
    assert shown.output.split() == expected


def test_usage_lines_are_written_as_people_expect() -> None:
    def usage(*verb: str) -> str:
        shown = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "150"}).output
        return next(line.strip() for line in shown.splitlines() if "Usage:" in line)

    assert usage("prepare") == "Usage: gensr prepare [OPTIONS] SOURCE RAW OUT [KEY=VALUE]..."
    assert usage("compare") == "Usage: gensr compare [OPTIONS] RUN RUN..."
    assert usage("analyse") == "Usage: gensr analyse [OPTIONS] WHAT RUN... OUT"
    assert usage("sweep") == "Usage: gensr sweep [OPTIONS] FILE [PRESET|FILE] [KEY=VALUE]..."
    assert usage("doctor") == "Usage: gensr doctor [OPTIONS] [FOLDERS]..."


def test_long_lines_break_between_words_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "batch       64 events a step, and a path /" + 90 * "x"
    assert fitting([line], 12) == [line]  # a file, or a pipe
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((30, 24)))
    assert fitting([line, "", "short"], 12) == [
        "batch       64 events a step,",
        "            and a path",
        "            /" + 90 * "x",  # it can be copied
        "",
        "short",
    ]


def test_typos_are_blamed_on_where_they_stand(tmp_path: Path) -> None:
    def first_line(*words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(words[0], words[1:])
        return str(caught.value).splitlines()[0]

    assert first_line("demo", "optim.lrr=3") == "1 problem in the given settings"
    assert first_line("demo", "optim.micro_batch_size=7") == "1 problem in the given settings"
    assert first_line("demo", "train.max_steps=3") == "1 problem in the given settings"
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lrr: 3}")
    assert first_line(str(file), "optim.lr=3e-4") == f"1 problem in {file}"
    assert first_line(str(file), "run.x=1") == f"2 problems in {file} and the given settings"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.max_steps=3", "train.max_steps   unknown key. Did you mean run.max_steps?"),
        ("xyz.q=3", "xyz.q   unknown key. Known: data, model, optim, run, tracking, serving"),
        ("optim.lr=fast", "optim.lr   must be a valid number, got 'fast'"),
    ],
)
def test_what_is_wrong_with_a_setting(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [word])
    assert str(caught.value).splitlines()[1].strip() == message


def test_misspelt_presets_and_sources_get_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such preset\. Did you mean sasrec\? Presets: "):
        load_config("sasrecc")
    with pytest.raises(ConfigError, match=r"no such source\. Did you mean tables\? Sources: "):
        prepare("tablse", tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no such source\. Sources: "):
        prepare("postgres", tmp_path, tmp_path / "out")


def test_a_model_without_a_preset_has_its_defaults() -> None:
    assert load_config("gensr", ["optim.lr=3e-4"]) == load_config(None, ["optim.lr=3e-4"])
    assert dry_run(load_config("gensr"), "demo").facts
    with pytest.raises(ConfigError, match=r"there is no preset that documents typical sizes"):
        dry_run(load_config("gensr"), "gensr")


def test_a_preset_is_not_another_models() -> None:
    told = r"^preset demo is for gensr; model\.name=sasrec has other settings\. Put sasrec in place of demo$"
    with pytest.raises(ConfigError, match=told):
        load_config("demo", ["model.name=sasrec"])
    assert load_config("demo", ["model.name=gensr"]) == load_config("demo")


def test_a_models_file_says_its_class_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.models.baselines import bm25, sasrec

    monkeypatch.delattr(bm25, "MODEL")
    monkeypatch.setattr(sasrec.MODEL, "Settings", bm25.Bm25Settings)
    with pytest.raises(ConfigError, match=r"bm25\.py: must end with MODEL = YourClass$"):
        model_class("bm25")
    told = r"sasrec\.py: name of Bm25Settings is 'bm25', and must be the file's, 'sasrec'$"
    with pytest.raises(ConfigError, match=told):
        model_class("sasrec")


def test_a_stopped_verb_ends_with_75_and_says_how_it_continues(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, resumable():
        raise KeyboardInterrupt
    assert ended.value.exit_code == 75 and "the same command resumes" in capsys.readouterr().err


def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an installation of [serve], for example; a missing module of gensr itself is a fault."""

    def fail(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("trainer.doctor.run_checks", lambda **_: fail("deepspeed.ops"))
    monkeypatch.setattr(sys, "argv", ["gensr", "doctor"])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "lacks the package deepspeed.ops" in (said := capsys.readouterr().err) and "gensr[train]" in said
    assert "gensr[serve]" not in said and "pip install 'gensr[serve]'" in lacking("uvicorn.config")
    assert lacking("torchaudio").endswith("make install")
    monkeypatch.setattr("trainer.doctor.run_checks", lambda **_: fail("trainer.nothing"))
    with pytest.raises(ModuleNotFoundError):
        main()


def test_config_schema_is_a_schema() -> None:
    schema = json.loads(gensr("config", "schema").stdout)
    assert set(schema["properties"]) == {"data", "model", "optim", "run", "serving", "tracking"}


def test_config_schema_describes_inherited_settings() -> None:
    section = json.loads(gensr("config", "schema").stdout)["$defs"]["GenSRSettings"]["properties"]
    assert section["backbone"]["description"].startswith("hub name")
    assert section["cf_holdout"]["description"].startswith("which table of cf/")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("gensr", "trainer", "data_shards", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_code_presets_and_ds_configs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("gensr", "trainer", "data_shards", "ds_configs", "slurm"):
        expected = {
            str(p.relative_to(ROOT))
            for p in (ROOT / package).rglob("*")
            if p.suffix in SHIPPED and "__pycache__" not in p.parts
        }
        assert expected <= names
    assert not [name for name in names if name.startswith(("tests/", "shared/", "data/", "runs/"))]


def test_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Unpacked where pip would put it, with this environment's dependencies: no file of the checkout is
    needed."""
    installed = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        "--target",
        str(installed),
        str(wheel),
    ]
    subprocess.run(command, check=True, timeout=100, stdin=subprocess.DEVNULL)
    code = (
        "import sys; sys.argv[0] = 'gensr'; from trainer.cli import main; import trainer; "
        "print(trainer.__file__); main()"
    )
    submit = [
        "submit",
        "demo",
        "--gpus-per-node",
        "0",
        "--print",
        f"data.dir={make_tiny_folder(tmp_path / 'data')}",
        "run.dir=RUN",
    ]
    for arguments in (["--help"], ["config", "keys"], submit):
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=250,
            cwd=tmp_path,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(installed))


def test_a_verb_collects_garbage() -> None:
    """main() stops it until a verb is found."""
    gc.disable()
    try:
        assert CliRunner().invoke(app, ["config", "show", "demo"]).exit_code == 0
        assert gc.isenabled()
    finally:
        gc.enable()


def test_a_command_to_go_on_with_can_be_copied(tmp_path: Path) -> None:
    arguments = ["--users", "2", "--items", "200", "--days", "3"]
    shown = CliRunner().invoke(app, ["simulate", str(tmp_path / "my raw"), *arguments]).output
    assert f"gensr prepare kuaisar {quoted(tmp_path / 'my raw')} data/prepared" in shown
    assert quoted(Path("my raw")) == "'my raw'" and quoted(Path("data/raw")) == "data/raw"
