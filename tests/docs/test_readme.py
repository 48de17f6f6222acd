"""The documentation is true: every verb, option, key, preset, file and make target it names exists, and the
README's commands run."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from data_shards.settings import key_help
from tests.docs.pages import PAGES, README, ROOT, fenced, text_of
from tests.worlds import write_tables
from trainer.cli import app
from trainer.cli.help import settings_trees
from trainer.configs import config_type, load_config, preset_names
from trainer.training.schedule import grad_accum_steps

COMMAND = typer.main.get_command(app)
TREES = {**settings_trees(), "train": config_type()}  # with the settings of GenSR
SMALL = {
    "prepare": ["vocab_size=400", "history_max=10", "num_negatives=20"],
    "cf": ["cf.max_epochs=2", "cf.dim=16", "cf.holdout=none"],
    "train": [
        "run.max_steps=2",
        "optim.global_batch_size=8",
        "optim.micro_batch_size=8",
        "data.history_max=10",
        "run.valid_events=8",
    ],
    "evaluate": ["--no-baselines"],
}


def gensr_commands(text: str) -> list[list[str]]:
    """Arguments of every gensr command in code blocks and inline code."""
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    found = []
    for line in [*fenced(text), *inline]:
        for part in line.split("&&"):
            match = re.search(r"(?:^|\s)(?:gensr|-m trainer) (?=[a-z])(.+)$", part.strip())
            if match and (part.strip().startswith("gensr ") or "-m trainer " in part):
                found.append(shlex.split(match[1].split("#")[0]))
    return found


def click_command(arguments: list[str]) -> tuple[Any, list[str]]:
    command: Any = COMMAND
    while arguments and hasattr(command, "commands") and arguments[0] in command.commands:
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command, arguments


ALL_COMMANDS = [(path, arguments) for path in PAGES for arguments in gensr_commands(text_of(path))]


@pytest.mark.parametrize(
    ("path", "arguments"),
    ALL_COMMANDS,
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value.relative_to(ROOT)),
)
def test_commands_exist(path: Path, arguments: list[str]) -> None:
    command, rest = click_command(arguments)
    assert not hasattr(command, "commands"), f"no verb {arguments[0]}"
    options = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help"}
    verb = arguments[0]
    if verb != "submit":  # takes sbatch's options, too
        assert {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)} <= options
    overrides = [word.partition("=")[0] for word in rest if re.match(r"[a-z_.]+=", word)]
    tree = "train" if verb == "submit" else verb
    if tree in TREES:
        keys = {one.key for one in key_help(TREES[tree])}
        assert set(overrides) <= keys
    if tree == "train" and rest and re.fullmatch(r"[a-z][a-z0-9_]*", rest[0]):
        assert rest[0] in preset_names()


def test_every_verb_and_preset_is_described() -> None:
    page = text_of(ROOT / "docs" / "verbs.md")
    verbs = page.split("## All verbs")[1].split("\n## ")[0]
    assert {words[0] for words in gensr_commands(verbs)} == set(COMMAND.commands)  # type: ignore[attr-defined]
    presets = page.split("## Presets")[1].split("\n## ")[0]
    assert set(preset_names()) <= set(re.findall(r"^\| `([a-z0-9_]+)`", presets, flags=re.MULTILINE))


def test_keys_in_the_text_exist() -> None:
    known = {one.key for tree in TREES.values() for one in key_help(tree)}
    sections = {key.split(".")[0] for key in known if "." in key}
    for path in PAGES:
        for name in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=[^`]*)?`", text_of(path)):
            if name.split(".")[0] in sections and not name.endswith((".py", ".json", ".safetensors")):
                assert any(key == name or key.startswith(f"{name}.") for key in known), f"{path}: {name}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE))
    for path in PAGES:
        text = text_of(path)
        code = [*fenced(text), *re.findall(r"`([^`\n]+)`", text)]
        named = {word for line in code for word in re.findall(r"^make ([a-z-]+)", line)}
        assert named <= targets, path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bring_your_own_logs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands as they stand, with a tiny RAW and settings that make them short."""
    write_tables(tmp_path / "RAW")
    monkeypatch.chdir(tmp_path)
    commands = [
        shlex.split(line)[1:]
        for line in fenced(text_of(README).split("<!-- run by tests/docs")[1].split("\n## ")[0])
        if line.startswith("gensr ")
    ]
    assert len(commands) == 7
    for arguments in commands:
        result = CliRunner().invoke(app, [*arguments, *SMALL.get(arguments[0], [])], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "mine" / "evaluation-test.json").is_file()
    assert (tmp_path / "runs" / "mine" / "registry.json").is_file()
    assert (tmp_path / "runs" / "mlflow.db").is_file()


LAUNCH_LINES = [
    (path, line)
    for path in [*PAGES, *sorted((ROOT / "trainer" / "configs").glob("*.yaml"))]
    for line in re.sub(r" \\\n(#? *)", " ", text_of(path)).splitlines()
    if "accelerate launch --config_file ds_configs/" in line
    and re.search(r"-m (trainer|gensr) train \w+ ", line)
]


@pytest.mark.parametrize(("path", "line"), LAUNCH_LINES, ids=lambda value: str(value)[-60:])
def test_the_batch_of_a_documented_launch_line_is_shared_out(path: Path, line: str) -> None:
    """The micro-batches of all processes make up the global batch, for the preset as the line starts it."""
    words = line.split("accelerate launch ")[1].split("`")[0].split()
    preset, *overrides = words[words.index("train") + 1 :]
    if preset not in preset_names():
        pytest.skip(f"{preset} stands for any preset")
    file = ROOT / words[words.index("--config_file") + 1]
    processes = yaml.safe_load(file.read_text())["num_processes"]
    if "--num_processes" in words:
        processes = int(words[words.index("--num_processes") + 1])
    grad_accum_steps(load_config(preset, [word for word in overrides if "=" in word]), processes)
