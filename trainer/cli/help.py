"""Help for people: doctor, config, demo."""

import dataclasses
import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trainer.cli.base import (
    AsJson,
    MaybePreset,
    Overrides,
    answer,
    config_app,
    preset_and_settings,
    say,
    verb,
)
from trainer.errors import ConfigError

MAX_KEY_WIDTH = 38  # characters; a longer one pushes its text to the right


@verb("gensr doctor data/mine")
def doctor(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="prepared folders; every file is read and checked")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: packages, compiler, GPUs, processes, disk, MLflow's database, SLURM. Under a
    launcher: whether its processes reach each other. Exit code 1 if something is missing."""
    from trainer.doctor import run_checks

    checks = run_checks(prepared=folders or ())
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<20} {check.detail}")
        lines += [f"      fix: {check.fix}"] if check.fix and check.status != "OK" else []
    if checks:  # none: another rank of a launcher speaks
        answer([dataclasses.asdict(check) for check in checks], as_json, *lines)
    if any(check.status == "MISS" for check in checks):
        raise typer.Exit(1)


@config_app.command(epilog="Example: gensr config show demo optim.lr=3e-4")
def show(preset: MaybePreset = None, overrides: Overrides = None) -> None:
    """Print the effective configuration as YAML; secrets in URLs are hidden."""
    from data_shards.secrets import mask_secrets
    from data_shards.settings import to_yaml
    from trainer.configs import load_config

    preset, settings = preset_and_settings(preset, overrides)
    say(mask_secrets(to_yaml(load_config(preset, settings)).rstrip()))


@config_app.command(epilog="Example: gensr config keys train")
def keys(
    of: Annotated[
        str | None,
        typer.Argument(metavar="train|cf|prepare|MODEL", help="if omitted: all", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every key with its default, its meaning and, in brackets, its allowed values. A model's name
    (sasrec) lists its section model.*."""
    from data_shards.settings import did_you_mean, key_help
    from trainer.configs import preset_names
    from trainer.models.zoo import model_names, settings_class

    trees = settings_trees()
    if of in model_names():
        trees = {of: settings_class(of)}
    elif of is not None and of not in trees:
        known = [*trees, *model_names()]
        hint = (
            f" It is a preset: gensr config show {of} prints it."
            if of in preset_names()
            else did_you_mean(of, known)
        )
        raise ConfigError(f"no keys of {of!r}.{hint} There are: {', '.join(known)}")
    prefix = "model." if of in model_names() else ""
    document = {
        name: [key._asdict() for key in key_help(tree, prefix)]
        for name, tree in trees.items()
        if of in (None, name)
    }
    lines = []
    for name, of_verb in document.items():
        lines += [f"gensr {name}", *key_lines(of_verb), ""]
    if "train" in document:
        lines += [
            "Presets",
            *textwrap.wrap(", ".join(preset_names()), 108, initial_indent="  ", subsequent_indent="  "),
        ]
    answer(document, as_json, *lines)


def key_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """`key=default  meaning [allowed]`, wrapped to the terminal."""
    settings = [f"{row['key']}={_written(row['default'])}" for row in rows]
    width = min(max(map(len, settings)), MAX_KEY_WIDTH)
    columns = max(shutil.get_terminal_size((120, 24)).columns, 80)
    lines = []
    for setting, row in zip(settings, rows, strict=True):
        text = f"{row['help']} [{row['allowed']}]" if row["allowed"] else row["help"]
        parts = textwrap.wrap(" ".join(text.split()), columns - width - 4) or [""]
        lines += [f"  {setting:<{width}}  {parts[0]}", *(f"  {'':<{width}}  {part}" for part in parts[1:])]
    return lines


def _written(default: Any) -> str:
    return default if isinstance(default, str) else json.dumps(default)


@config_app.command(epilog="Example: gensr config schema > gensr.schema.json")
def schema(
    model: Annotated[str, typer.Argument(help="model.name whose section the schema includes")] = "gensr",
) -> None:
    """Print the JSON schema of a training configuration, for editors."""
    from pydantic import TypeAdapter

    from trainer.configs import config_type

    say(json.dumps(TypeAdapter(config_type(model)).json_schema(), indent=2))


def settings_trees() -> dict[str, Any]:
    from data_shards.options import PrepareSettings
    from trainer.config import CfRoot
    from trainer.configs import config_type

    return {"train": config_type(), "cf": CfRoot, "prepare": PrepareSettings}


@verb("gensr demo")
def demo(
    data_dir: Annotated[Path, typer.Option(help="prepared folder; raw logs go to DATA_DIR-raw")] = Path(
        "data/demo"
    ),
    run_dir: Annotated[Path, typer.Option(help="run folder; MLflow's database goes next to it")] = Path(
        "runs/demo"
    ),
) -> None:
    """Run every step offline: simulate, prepare, cf, train, evaluate, register, and a summary."""
    from trainer.demo import run_demo

    run_demo(data_dir, run_dir)
