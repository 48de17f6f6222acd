"""mkdocs calls these: the pages that are made from the code join the site (trainer/cli/reference.py)."""

from typing import Any

TITLES = {
    "reference-verbs.md": "Reference: verbs",
    "reference-keys.md": "Reference: keys",
    "format.md": "Reference: the prepared folder",
}


def on_config(config: Any) -> Any:
    config.nav.append({"Reference": [{title: name} for name, title in TITLES.items()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    from pathlib import Path

    from mkdocs.structure.files import File

    from trainer.cli.reference import pages

    readme = Path(config.config_file_path).parent / "data_shards" / "README.md"
    made = {**pages(), "format.md": readme.read_text(encoding="utf-8")}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files
