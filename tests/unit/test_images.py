"""Dockerfile and apptainer.def hold what an installation reads: they cannot be built everywhere."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READ_BY_SETUP = {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
# rooms that answer requests, and what the names of their packages are in Python
SERVING = ("gensr", "data_shards", "trainer/models", "trainer/data", "trainer/runs", "trainer/serving")
MODULES = {"PyYAML": "yaml", "faiss-cpu": "faiss", "mlflow-skinny": "mlflow"}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def copied(name: str) -> set[str]:
    lines = (ROOT / name).read_text().splitlines()
    if name == "Dockerfile":
        return {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    if name == ".dockerignore":
        return {line[1:] for line in lines if line.startswith("!")}
    return {line.split()[0] for line in lines if re.match(r"    \S+ /src/", line)}


@pytest.mark.parametrize("name", ["Dockerfile", ".dockerignore", "apptainer.def"])
def test_every_package_is_copied(name: str, setup: configparser.ConfigParser) -> None:
    include = setup["options.packages.find"]["include"].split()
    packages = {package for package in include if not package.endswith(".*")}
    assert copied(name) == packages | READ_BY_SETUP


@pytest.mark.parametrize("name", ["Dockerfile", "apptainer.def"])
def test_the_extras_exist(name: str, setup: configparser.ConfigParser) -> None:
    text = (ROOT / name).read_text()
    asked = set(",".join(re.findall(r"\.\[([a-z,]+)\]|extras=([a-z,]+)", text)[0]).split(",")) - {""}
    assert asked and asked <= set(setup["options.extras_require"])


def imported_at_once(path: Path) -> set[str]:
    """Top packages that a module imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def test_what_answers_needs_no_package_of_training(setup: configparser.ConfigParser) -> None:
    lines = (setup["options"]["install_requires"] + setup["options.extras_require"]["serve"]).split("\n")
    names = {re.split(r"[<>=]", line)[0] for line in lines if line}
    known = {MODULES.get(name, name.replace("-", "_")) for name in names} | set(sys.stdlib_module_names)
    files = [path for room in SERVING for path in (ROOT / room).rglob("*.py")]
    needed = {name: path for path in files for name in imported_at_once(path)}
    ours = {"gensr", "trainer", "data_shards", "ds_configs", "slurm"}
    assert len(files) > 100 and {"torch", "scipy"} <= set(needed)
    assert not {name: path for name, path in needed.items() if name not in known | ours}
