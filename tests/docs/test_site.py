"""The notebook runs, and the pages that are made from the code hold what they should."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from data_shards.settings import leaf_fields
from tests.docs.pages import ROOT
from trainer.cli import reference
from trainer.configs import config_type

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell after cell, in one namespace, as a kernel would; it is stored without outputs."""
    monkeypatch.chdir(tmp_path)
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert document["nbformat"] == 4
    cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    losses = [row["loss"] for row in names["curve"].losses]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert set(names["found"].metrics["task"]) == {"rec", "src"}
    assert isinstance(names["model"].search("garden lamp", k=2), pd.DataFrame)


def test_the_reference_is_made_from_the_code() -> None:
    pages = reference.pages()
    verbs, keys = pages["reference-verbs.md"], pages["reference-keys.md"]
    assert "## gensr bench data\n" in verbs and "`--candidates`" in verbs
    assert "| `optim.beta2` | `0.999` | > 0 and &lt; 1 | AdamW's second-moment decay |" in keys
    assert "## gensr train, model.name=sasrec\n" in keys and "`gensr prepare amazon` begins with" in keys
    assert all(line.count(" | ") == 3 for line in keys.splitlines() if line.startswith("| `"))
    assert all(f"| `{key}` |" in keys for key, _ in leaf_fields(config_type()))


def test_the_site_builds(tmp_path: Path) -> None:
    """With mkdocs-material (pip install -e .[docs]); `make docs` does the same."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build(config)
    for page in ("index", "tutorial/index", "reference-keys/index", "format/index"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
