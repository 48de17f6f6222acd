"""Dockerfile and apptainer.def hold what an installation reads: they cannot be built everywhere."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READ_BY_SETUP = {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}


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
