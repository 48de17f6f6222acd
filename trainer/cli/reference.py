"""The reference of the documentation site, generated from the code: verbs and their options, keys and their
values. docs/hooks.py adds it to the site."""

from collections.abc import Iterator, Sequence
from typing import Any

import typer

from data_shards.options import SOURCE_DEFAULTS, PrepareSettings
from data_shards.settings import key_help
from trainer.cli.base import app
from trainer.config import CfRoot
from trainer.configs import config_type
from trainer.models.zoo import model_names, settings_class


def pages() -> dict[str, str]:
    """File name → Markdown."""
    return {"reference-verbs.md": verbs_page(), "reference-keys.md": keys_page()}


def verbs_page() -> str:
    lines = ["# Reference: verbs", ""]
    for name, command in _leaves(typer.main.get_command(app), "gensr"):
        lines += [f"## {name}", "", str(command.help or ""), ""]
        rows = [(_names(parameter), parameter) for parameter in command.params]
        lines += _table(
            ["argument or option", "default", "meaning"],
            [
                (f"`{names}`", _default(parameter), str(getattr(parameter, "help", "") or ""))
                for names, parameter in rows
            ],
        )
        if command.epilog:
            lines += [f"`{command.epilog.removeprefix('Example: ')}`", ""]
    return "\n".join(lines)


def keys_page() -> str:
    lines = ["# Reference: keys", "", "`section.key=value` after a verb, or in a YAML file.", ""]
    lines += ["## gensr train", "", *_keys(config_type())]
    for name in model_names():
        if name != "gensr":
            lines += [f"## gensr train, model.name={name}", "", *_keys(settings_class(name), "model.")]
    lines += ["## gensr cf", "", *_keys(CfRoot), "## gensr prepare", "", *_keys(PrepareSettings)]
    for source, defaults in SOURCE_DEFAULTS.items():
        if defaults:
            changed = ", ".join(f"`{key}={value}`" for key, value in defaults.items())
            lines += [f"`gensr prepare {source}` begins with {changed}.", ""]
    return "\n".join(lines)


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for verb, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from _leaves(inner, f"{name} {verb}")
        else:
            yield f"{name} {verb}", inner


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def _default(parameter: Any) -> str:
    value = parameter.default
    return "" if value is None or callable(value) or value is False or value == "" else f"`{value}`"


def _keys(tree: Any, prefix: str = "") -> list[str]:
    rows = [
        (f"`{key}`", f"`{default}`" if default != "" else "", takes, text)
        for key, default, text, takes in key_help(tree, prefix)
    ]
    return _table(["key", "default", "takes", "meaning"], rows)


def _table(head: list[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = (" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
