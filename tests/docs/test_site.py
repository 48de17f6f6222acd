"""The notebook runs, and the pages that are made from the code hold what they should."""

import html
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

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
    assert "| `--seed` | `0` |" in verbs  # 0 is a default to be told
    assert "| `optim.beta2` | `0.999` | > 0 and &lt; 1 | AdamW's second-moment decay |" in keys
    assert "## gensr train, model.name=sasrec\n" in keys and "`gensr prepare amazon` begins with" in keys
    assert all(line.count(" | ") == 3 for line in keys.splitlines() if line.startswith("| `"))
    assert all(f"| `{key}` |" in keys for key, _ in leaf_fields(config_type()))


def test_the_site_builds(tmp_path: Path) -> None:
    """With mkdocs-material; `make docs` does the same. Links from page to page arrive, at a heading, too."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build(config)
    for page in ("index", "tutorial/index", "reference-keys/index", "format/index"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
    assert not broken_links(tmp_path / "site")


def broken_links(site: Path) -> list[str]:
    """`page → link` of every link inside the site that arrives nowhere. Links into the repository (files
    outside docs/) lead out of the site, or to a file that it does not have."""
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    anchors = {page: set(re.findall(r' id="?([^"\s>]+)', text)) for page, text in pages.items()}
    broken, checked = [], 0
    for page, text in pages.items():
        if page.name == "404.html":  # its links start at the root of a server
            continue
        for link in re.findall(r'<a[^>]* href="?([^"\s>]+)', text):
            address, _, anchor = unquote(html.unescape(link)).partition("#")
            if re.match(r"[a-z]+:", address) or address.startswith("/"):
                continue
            target = (page.parent / address).resolve() if address else page
            target = target / "index.html" if target.is_dir() else target
            if target.suffix != ".html" or not target.is_relative_to(site):
                continue
            checked += 1
            if target not in pages or (anchor and anchor not in anchors[target]):
                broken.append(f"{page.relative_to(site)} → {link}")
    assert checked > 100
    return broken
