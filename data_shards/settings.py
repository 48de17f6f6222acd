"""Settings: frozen pydantic dataclasses ← YAML ← `section.key=value`, validated once, every problem reported
at once.

A tree is a pydantic dataclass whose fields are plain values or further such dataclasses; the docstring under
a field is its help.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from data_shards.errors import ConfigError

T = TypeVar("T")
MAX_YAML_NODES, MAX_YAML_DEPTH = 100_000, 50  # of a settings file; ours have about 100 and 3


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only pydantic dataclass that refuses unknown keys."""
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, json_schema_extra=_describe_inherited)
    made: Any = pydantic_dataclass(config=config, frozen=True, kw_only=True)(cls)
    return made


def _describe_inherited(schema: dict[str, Any], cls: type) -> None:
    """The JSON schema gets the docstrings of fields of bases, too: pydantic drops them."""
    for name, field in schema.get("properties", {}).items():
        if "description" not in field and (text := _description(cls, name)):
            field["description"] = text


def load(
    cls: type[T],
    yaml_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    keys_command: str = "gensr config keys",
) -> T:
    """Build a settings tree: defaults ← base ← yaml_file ← overrides ("section.key=value"). A text that
    begins with ~/ is a path in the home folder.

    Raises ConfigError that lists every problem with its dotted key; nothing is half-built.
    """
    problems: list[tuple[str, str]] = []
    tree: dict[str, Any] = _deep_copy(base or {})
    if yaml_file is not None:
        _merge(tree, read_yaml(yaml_file))
    leaves = dict(leaf_fields(cls))
    texts = {key for key, field in leaves.items() if field.type is str}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            problems.append((override, "must look like section.key=value"))
        elif conflict := _set(tree, key.split("."), _parse_value(text, key in texts)):
            problems.append((key, conflict))
    for key, text in flatten(tree).items():
        if key in texts and str(text).startswith("~/"):  # no shell expands it after "key=", none reads a file
            _set(tree, key.split("."), os.path.expanduser(text))
    problems += _unknown_keys(cls, tree, list(leaves))
    value: T | None = None
    try:
        value = TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        problems += [
            _describe(e)
            for e in error.errors()
            if e["type"] not in ("unexpected_keyword_argument", "extra_forbidden")
        ]
    if problems:
        raise ConfigError(format_problems(problems, where_of(problems, yaml_file, overrides), keys_command))
    assert value is not None
    return value


def where_of(
    problems: Sequence[tuple[str, str]], yaml_file: str | Path | None, overrides: Sequence[str]
) -> str:
    """Where the reader has to look: the file, the settings given with it (on the command line or in Python),
    or both."""
    if yaml_file is None:
        return "the settings"
    given = {override.partition("=")[0] for override in overrides} | set(overrides)
    on_top = [any(f"{key}.".startswith(f"{word}.") for word in given) for key, _ in problems]
    beside = "the given settings"
    return beside if all(on_top) else f"{yaml_file} and {beside}" if any(on_top) else str(yaml_file)


def format_problems(
    problems: Sequence[tuple[str, str]], where: str, keys_command: str = "gensr config keys"
) -> str:
    """The house form of a list of configuration problems (also for checks that need more than one field)."""
    width = max(len(key) for key, _ in problems)
    lines = [f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {where}"]
    lines += [f"  {key:<{width}}   {message}" for key, message in problems]
    return "\n".join([*lines, f"Nothing was started. All keys: {keys_command}"])


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises ConfigError naming the file when it is missing, unreadable, not a mapping,
    or grows beyond all bounds."""
    try:
        document = parse_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must hold sections and keys, found {type(document).__name__}")
    return document


def parse_yaml(text: str) -> Any:
    """YAML as plain values. Raises yaml.YAMLError, also for what makes PyYAML itself fall over: dates that do
    not exist, nesting without end, aliases that unfold to more than MAX_YAML_NODES."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _unfolded_size(node, {}, 0)
        return loader.construct_document(node)
    except yaml.YAMLError:
        raise
    except (RecursionError, MemoryError) as error:
        raise yaml.YAMLError("nested too deeply") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # of its constructors
        raise yaml.YAMLError(f"a value that cannot be read ({error})") from error
    finally:
        loader.dispose()


def _unfolded_size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Nodes of a tree in which every alias is a copy. known: sizes by id of a node; 0 while it is counted."""
    if id(node) not in known:
        known[id(node)] = 0
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
        inner = node.value if isinstance(node, yaml.SequenceNode) else inner
        known[id(node)] = 1 + sum(_unfolded_size(part, known, depth + 1) for part in inner)
    size = known[id(node)]
    if size == 0:
        raise yaml.YAMLError("an alias that contains itself")
    if size > MAX_YAML_NODES or depth > MAX_YAML_DEPTH:
        raise yaml.YAMLError(f"unfolds to more than {MAX_YAML_NODES:,} values or {MAX_YAML_DEPTH} levels")
    return size


def to_dict(tree: Any) -> dict[str, Any]:
    """The tree as nested plain dicts, ready for YAML or JSON."""
    return dataclasses.asdict(tree)


def to_yaml(tree: Any) -> str:
    return yaml.safe_dump(to_dict(tree), sort_keys=False, allow_unicode=True)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} → {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def flat_as_json(tree: Any) -> dict[str, Any]:
    """flatten(tree) with the values that a file of JSON gives back: lists, no tuples."""
    as_json: dict[str, Any] = json.loads(json.dumps(tree))
    return flatten(as_json)


class Change(NamedTuple):
    """A setting that differs; None where a side lacks it."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.was}, is {self.now}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any], ignore: Container[str] = ()) -> list[Change]:
    """Keys of two flat mappings whose values differ, in the order of the alphabet."""
    return [
        Change(key, before.get(key), now.get(key))
        for key in sorted({*before, *now})
        if key not in ignore and before.get(key) != now.get(key)
    ]


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """{"optim.lr": 3e-4} or {"optim": {"lr": 3e-4}} → ["optim.lr=0.0003"], as the command line has them."""
    return [f"{key}={_text_of(value)}" for key, value in flatten(settings).items()]


def _text_of(value: Any) -> str:
    """A value as _parse_value() reads it back: text that looks like something else is quoted."""
    import numpy as np  # the settings of a Python program may be its numbers

    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, str):
        try:
            return json.dumps(value)
        except TypeError as error:
            raise ConfigError(f"settings: {value!r} is no number, text, list or yes/no: {error}") from error
    try:
        is_plain = not value or parse_yaml(value) == value
    except yaml.YAMLError:
        is_plain = False
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def leaf_fields(cls: Any) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(dotted key, field) of every value in the tree, in order."""
    return ((key, field) for key, _, field in _leaves(cls, ""))


def _leaves(cls: Any, prefix: str) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """(dotted key, the section's class, field)."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", cls, field


class Key(NamedTuple):
    """What people are told of a value in the tree."""

    key: str  # dotted
    default: Any
    help: str  # the docstring under the field
    allowed: str  # `true or false`, `uniform, popularity`, `≥ 0 and < 1`; "" for free text


def key_help(cls: Any, prefix: str = "") -> Iterator[Key]:
    """Of every value in the tree, in order."""
    for key, section, field in _leaves(cls, prefix):
        info = section.__pydantic_fields__[field.name]
        default = info.get_default(call_default_factory=True)
        yield Key(key, default, _description(section, field.name), _allowed(info))


LARGEST_SAID = 1 << 31  # a bound of the machine's integers tells nobody anything


def _allowed(info: Any) -> str:
    if get_origin(info.annotation) is Literal:
        return ", ".join(map(str, get_args(info.annotation)))
    if info.annotation is bool:
        return "true or false"
    whole = "whole number" if info.annotation is int else ""
    bounds = [
        f"{sign} {bound}"
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        for part in info.metadata
        if (bound := getattr(part, attribute, None)) is not None and bound < LARGEST_SAID
    ]
    return " ".join(filter(None, [whole, " and ".join(bounds)]))


def _description(cls: Any, name: str) -> str:
    """pydantic knows the docstrings of a class's own fields, not those of its bases."""
    fields = (vars(base).get("__pydantic_fields__", {}).get(name) for base in cls.__mro__)
    return next((field.description for field in fields if field and field.description), "")


def _parse_value(text: str, is_text: bool) -> Any:
    """What is text stays as it is, unless it is quoted: YAML would cut a path at " #", and take 007, no or
    2024-01-01 for something else."""
    if text == "" or (is_text and text[0] not in "'\""):
        return text
    try:
        return parse_yaml(text)  # "3e-4" stays text; pydantic reads it as a number where one is wanted
    except yaml.YAMLError:
        return text


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> str:
    """Set tree[path] = value; returns a problem, or "" when it was set."""
    for depth, part in enumerate(path[:-1]):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            return f"{'.'.join(path[: depth + 1])} holds a value, not a section"
    tree[path[-1]] = value
    return ""


def _merge(into: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = _deep_copy(value)


def _deep_copy(value: Any) -> Any:
    return {k: _deep_copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _unknown_keys(
    cls: Any, tree: Mapping[str, Any], known: Sequence[str], prefix: str = ""
) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in fields:
            below = flatten(value, f"{dotted}.") if isinstance(value, Mapping) else {}
            problems += [(name, f"unknown key.{_suggestion(name, known)}") for name in below or [dotted]]
        elif dataclasses.is_dataclass(fields[key].type) and isinstance(value, Mapping):
            problems += _unknown_keys(fields[key].type, value, known, f"{dotted}.")
    return problems


def _suggestion(key: str, known: Sequence[str]) -> str:
    """The end of an unknown-key message: the closest dotted key, then the key with the same last part or an
    abbreviation of it."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    last = key.rsplit(".", 1)[-1]
    initials = "".join(word[0] for word in last.split("_") if word)
    same_section = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
    close = (
        close
        or [k for k in known if k.rsplit(".", 1)[-1] == last]
        or [k for k in same_section if k.rsplit(".", 1)[-1] == initials]
    )
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]}?"
    sections = dict.fromkeys(k.partition(".")[0] for k in known)
    return f" Known: {', '.join(same_section or sections)}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """` Did you mean tables?`, or "" where nothing is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _describe(error: Any) -> tuple[str, str]:
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message.partition(", unable to parse")[0]  # what was wanted is enough: the value follows
    if error["type"] == "missing":
        return key, "is required"
    if error["type"] == "value_error":
        return key or "settings", message
    prefix = "" if error["msg"].startswith("Value error") else "must be "
    return key, f"{prefix}{message}, got {error['input']!r}"
