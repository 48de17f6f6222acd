"""What the pages point at exists, and they read well in a terminal."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from data_shards.options import SOURCE_DEFAULTS
from data_shards.prepare import prepare
from tests.docs.pages import PAGES, ROOT, anchors, fenced, prose, text_of
from tests.tiny_folder import make_tiny_folder
from trainer.evaluation.metrics import METRICS, metric_values

SOURCES = ("trainer", "data_shards", "benchmarks", "ds_configs", "slurm", "tests", "docs", ".ci")
SUFFIXES = r"(?:py|md|sh|sbatch|ya?ml|json|cfg|toml|png|html|css|js)"
FILE = re.compile(rf"[a-z_.][\w.-]*(?:/[\w.-]+)+\.{SUFFIXES}")
MADE_LATER = ("data/", "runs/", "slurm/env.sh")  # by the examples, and by the owner of a cluster account
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def named_files(text: str) -> set[str]:
    """Paths in inline code, and those in code blocks that begin with a folder of sources. Names in capitals
    (RUN/…, NAME.py) stand for many."""
    inline = " ".join(re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)))
    words = {word.strip(",;:()'\"") for word in inline.split()}
    words |= {word for line in fenced(text) for word in line.split() if word.startswith(SOURCES)}
    return {
        word for word in words if FILE.fullmatch(word) and not re.search(r"\b[A-Z]{3,}\b", Path(word).stem)
    }


def exists(name: str, page: Path) -> bool:
    return (ROOT / name).is_file() or (page.parent / name).is_file()


@each_page
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(text_of(linked)), target


@each_page
def test_named_files_exist(path: Path) -> None:
    missing = {name for name in named_files(text_of(path)) if not exists(name, path)}
    assert not {name for name in missing if not name.startswith(MADE_LATER)}


@each_page
def test_prose_fits_in_110_columns(path: Path) -> None:
    assert not [f"{number}: {line}" for number, line in prose(text_of(path)) if len(line) > 110]


@each_page
def test_no_puzzling_words(path: Path) -> None:
    """Phrases of earlier pages that readers stumbled over, and a document that is not here."""
    words = ("method.md", "hub or 0", "29, busy", "for want of", "from nothing", "no run folder", "in turns")
    assert not [word for word in words if word in text_of(path)]


def test_letters_of_tensor_names_are_explained() -> None:
    """Every capital letter that ends a tensor's name in trainer/models stands in trainer/README.md."""
    section = text_of(ROOT / "trainer" / "README.md").split("## Letters in tensor names")[1].split("\n## ")[0]
    explained = set(re.findall(r"\| ([A-Z]) (?=\|)", section))
    used = {
        letter
        for path in (ROOT / "trainer" / "models").rglob("*.py")
        for letters in re.findall(r"\b[a-z]\w*_([A-Z]{1,5})\b", path.read_text(encoding="utf-8"))
        for letter in letters
    }
    assert used <= explained


def test_equations_name_functions_that_exist() -> None:
    """The third column of the equations' tables: Class.function or function, defined in trainer/models."""
    text = text_of(ROOT / "trainer" / "models" / "gensr" / "README.md")
    rows = re.findall(r"^\| (?:Eq|E_).+\| (.+) \|$", text, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([A-Za-z_.]+)`", row)}
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "trainer" / "models").rglob("*.py")
    )
    assert len(named) > 10
    for name in named:
        owner, _, function = name.rpartition(".")
        assert f"def {function}(" in source, name
        assert not owner or f"class {owner}(" in source, name


def test_every_page_of_docs_is_listed() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    site = yaml.safe_load(text_of(ROOT / "mkdocs.yml"))
    assert {page for entry in site["nav"] for page in entry.values()} == pages
    index = text_of(ROOT / "docs" / "index.md")
    assert pages - {"index.md"} <= set(re.findall(r"\]\(([\w.]+)\)", index))


def test_citation_and_readme_agree() -> None:
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    paper = citation["preferred-citation"]
    readme = " ".join(text_of(ROOT / "README.md").split())
    assert paper["title"] in readme
    assert paper["url"] in readme
    for author in paper["authors"]:
        assert f"{author['given-names']} {author['family-names']}" in readme
        assert f"{author['family-names']}, {author['given-names']}" in readme


@pytest.mark.parametrize("with_categories", [True, False])
def test_the_sample_of_the_format_reads_every_folder(
    prepared: Path, tmp_path: Path, with_categories: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared if with_categories else make_tiny_folder(tmp_path / "tiny")
    after = text_of(ROOT / "data_shards" / "README.md").split("<!-- run by tests/docs -->\n```python\n")[1]
    exec(after.split("```")[0].replace("OUT/", f"{folder}/"), {})
    said = capsys.readouterr().out
    assert re.search(r"^item \d+ \['\w+'\]$" if with_categories else r"^item \d+ \[\]$", said, re.MULTILINE)
    assert "before: " in said and "recommended" in said and "found by '" in said


def test_numbers_of_ones_own_are_those_of_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rank, num_tied = np.array([1.0, 3.5, 20.0, 20.5, 50.5, np.inf]), np.array([1, 4, 3, 2, 100, 1])
    events = {"task": ["rec"] * 3 + ["src"] * 3, "user_id": list("aabbbc"), "event_id": range(6)}
    more = {"rank": rank, "num_tied": num_tied, "history_length": ["1–4", "0"] * 3}
    for run in ("RUN", "OTHER"):
        (tmp_path / run).mkdir()
        pd.DataFrame(events | more).to_parquet(tmp_path / run / "evaluation-test.parquet")
    sample = text_of(ROOT / "docs" / "evaluation.md").split("<!-- run by tests/docs -->\n```python\n")[1]
    sample = sample.split("```")[0].replace("{run}/", f"{tmp_path}/{{run}}/").replace("k=50", "k=20")
    names: dict[str, Any] = {}
    exec(sample, names)
    values = metric_values(torch.from_numpy(rank), torch.from_numpy(num_tied)).numpy()
    for column in ("recall", "ndcg"):
        np.testing.assert_allclose(names["ours"][column], values[:, METRICS.index(f"{column}@20")])
    assert len(names["gains"]) == 4 and not names["gains"].any()
    assert "\\begin{tabular}" in capsys.readouterr().out


def test_lists_become_the_files_that_other_tools_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("RUN").mkdir()
    events = pd.DataFrame(
        {"event_id": [7, 9], "user_id": ["u", "v"], "item_id": ["a", "b"], "rank": [2.0, 9.0]}
    )
    lists = pd.DataFrame({"event_id": [7, 7], "place": [1, 2], "item_id": ["c", "a"], "score": [0.5, -1.25]})
    events.to_parquet("RUN/evaluation-test.parquet")
    lists.to_parquet("RUN/lists-test.parquet")
    text = text_of(ROOT / "docs" / "evaluation.md").split("<!-- run by tests/docs -->\n```python\n")[2]
    exec(text.split("```")[0], {})
    assert Path("test.run").read_text() == "7 Q0 c 1 0.5 gensr\n7 Q0 a 2 -1.25 gensr\n"
    assert Path("test.qrels").read_text() == "7 0 a 1\n9 0 b 1\n"


def test_the_source_in_the_readme_is_prepared_and_what_its_rows_lack_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names one reason to drop a row; the others are found for every source."""
    text = text_of(ROOT / "data_shards" / "README.md").split("## A new source")[1]
    module = ModuleType("data_shards.sources.shop")
    exec(text.split("```python\n")[1].split("```")[0], vars(module))
    monkeypatch.setitem(sys.modules, "data_shards.sources.shop", module)
    monkeypatch.setitem(SOURCE_DEFAULTS, "shop", {})
    monkeypatch.setattr("data_shards.prepare.SOURCES", (*SOURCE_DEFAULTS,))
    goods = [f"g{number}" for number in range(9)]
    rows = [
        {
            "visitor": f"v{u}",
            "ts": 1_700_000_000 + 43_200 * t + u,
            "shown": goods[t : t + 2],
            "clicked": [goods[t]],
        }
        | {"q": None if t % 2 else "red lamp"}
        for u in range(4)
        for t in range(8)
    ]
    one = {**rows[0], "shown": goods[:1]}
    rows += [{**one, "visitor": None}, {**one, "ts": None}, {**one, "shown": [None]}, {**one, "q": " "}]
    rows.append({**one, "shown": ["test-1"]})
    titles = [{"sku": sku, "title": f"lamp {sku}"} for sku in goods]
    for name, lines in (("sessions.jsonl", rows), ("goods.jsonl", titles)):
        (tmp_path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    raw = prepare("shop", tmp_path, tmp_path / "out", ["num_negatives=1", "min_interactions=0"]).raw
    assert raw["counts"]["train"]["src"] > 0 < raw["counts"]["train"]["rec"]
    reasons = ("no user_id", "no time", "no item_id", "search without a query", "test item")
    assert raw["dropped"] == dict.fromkeys(reasons, 1)


def test_the_model_in_contributing_is_the_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- is (\S+), checked by tests/docs -->\n```python\n(.*?)```", text, re.DOTALL)
    assert shown is not None
    assert shown[2] == (ROOT / shown[1]).read_text(encoding="utf-8")
