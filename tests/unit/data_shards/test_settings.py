"""Settings files and overrides: one ConfigError or a value, never a traceback or a full memory."""

from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import ConfigError
from data_shards.options import PrepareSettings, load_prepare_settings
from data_shards.settings import load, overrides_of, parse_yaml, read_yaml, to_yaml
from trainer.configs import config_from_dict, load_config

BOMB = "a0: &a0 [1, 2, 3]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGE_BOMB = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "unfolds to more than 100,000 values"),
        (MERGE_BOMB, "unfolds to more than 100,000 values"),
        ("a: &a [*a]", "an alias that contains itself"),
        ("a: &a {b: *a}", "an alias that contains itself"),
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 100_000, "nested too deeply"),
        ("a: " + "[" * 60 + "]" * 60, "50 levels"),
        ("a: 2023-99-99", "a value that cannot be read"),
        ("a: 0x_", "a value that cannot be read"),
        ("a: !!bool maybe", "a value that cannot be read"),
        ("a: !!timestamp noon", "a value that cannot be read"),
        ("a: !!int ''", "a value that cannot be read"),
        ("a: " + "9" * 5000, "a value that cannot be read"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: \x00", "not valid YAML"),
        ("- 1", "must hold sections and keys, found list"),
    ],
)
def test_yaml_that_cannot_be_settings_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)mine\.yaml: .*{message}"):
        read_yaml(path)


def test_a_file_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(tmp_path / "latin.yaml")


def test_aliases_of_a_usual_size_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: &base {seed: 3}\nother:\n  <<: *base\n  split: time\nlast: *base\n")
    assert read_yaml(path) == {
        "base": {"seed": 3},
        "other": {"seed": 3, "split": "time"},
        "last": {"seed": 3},
    }
    path.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load(PrepareSettings, path).seed == 3


@pytest.mark.parametrize("text", ["2023-99-99", "0x_", "[" * 5000, "&a [*a]", "9" * 5000, "a: b: c", "\x00"])
def test_an_override_that_is_no_yaml_is_text(text: str) -> None:
    assert load_prepare_settings("tables", [f"tokenizer={text}"]).tokenizer == text


@pytest.mark.parametrize(
    "text", ["runs #1/a", "#1", "a: b", "&a b", "007", "5", "2024-01-01", "12:30", "no", "null", "~", "[a]"]
)
def test_a_text_is_taken_as_it_stands(text: str) -> None:
    """YAML cut a folder's name at " #" without a word, and refused what it took for a number or a date."""
    config = load_config(None, [f"run.dir={text}", "optim.lr=3e-4"])
    assert (config.run.dir, config.optim.lr) == (text, 3e-4)
    assert config_from_dict(parse_yaml(to_yaml(config))) == config
    assert load_config(None, [f"run.dir='{text}'"]).run.dir == text, "quotes are YAML's"


def test_the_home_folder_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands ~ after "run.dir=": runs went to a folder ./~, and a folder in ~ was not found."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "mine.yaml"
    file.write_text("data: {dir: ~/data}\nrun: {dir: ~/ignored}\n")
    config = load_config(str(file), ["run.dir=~/runs/a", "run.init_from=runs/~/b"])
    assert config.data.dir == str(tmp_path / "data") and config.run.dir == str(tmp_path / "runs/a")
    assert config.run.init_from.endswith("runs/~/b"), "elsewhere it is a name"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain text", "plain text"),
        ("", ""),
        ("3e-4", "3e-4"),  # text of YAML 1.1; pydantic reads it as a number where one is wanted
        ("no", '"no"'),
        ("ü: x", '"ü: x"'),
        ("😀 #", '"😀 #"'),
        (True, "true"),
        (None, "null"),
        (1e-4, "0.0001"),
        (1e-5, "1e-05"),
        ([1, "a"], '[1, "a"]'),
        (Path("a b"), "a b"),
    ],
)
def test_settings_as_the_command_line_has_them(value: Any, text: str) -> None:
    assert overrides_of({"run.dir": value}) == overrides_of({"run": {"dir": value}}) == [f"run.dir={text}"]
    if isinstance(value, str):
        assert load_config(None, overrides_of({"run.dir": value})).run.dir == value
