"""Who may import whom (trainer/README.md), read from the source by ast; and that every third-party import is
declared."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gensr", "trainer", "data_shards", "ds_configs", "slurm")
MLFLOW_FILES = {
    f"trainer/{name}.py"
    for name in (
        "tracking/about",
        "tracking/store",
        "tracking/delivery",
        "tracking/machine",
        "registry/store",
        "registry/signature",
        "registry/versions",
        "registry/pyfunc_model",
    )
}
# Distribution names of import names that differ from them.
DISTRIBUTIONS = {
    "yaml": "PyYAML",
    "annotated_types": "annotated-types",
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
}
BUILT_IN_PARTS = {"gensr", "trainer", "data_shards", "ds_configs", "slurm", "tests"}


def layers() -> list[set[str]]:
    """The picture in trainer/README.md, top to bottom: two spaces separate names, more a comment."""
    text = (ROOT / "trainer" / "README.md").read_text(encoding="utf-8")
    picture = text.split("## Who may import whom")[1].split("```")[1].strip().splitlines()
    return [{name.rstrip("/") for name in re.split(r" {3,}", line)[0].split()} for line in picture]


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(full name of what is imported, whether only type checkers see it) of every import in a file, also
    those inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in typing_only


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """trainer/models/gensr/model.py → model, trainer/demo.py → demo."""
    return path.relative_to(ROOT / "trainer").parts[0].removesuffix(".py")


def trainer_graph() -> dict[str, set[str]]:
    """module of trainer → modules of trainer that it imports, packages as one; for type checkers only does
    not count."""
    graph: dict[str, set[str]] = {}
    for path in (ROOT / "trainer").rglob("*.py"):
        wanted = {
            name.split(".")[1]
            for name, typing_only in imports(path)
            if name.startswith("trainer.") and not typing_only
        }
        graph.setdefault(module_of(path), set()).update(wanted - {module_of(path)})
    return {
        module: {name for name in wanted if name in graph}
        for module, wanted in graph.items()
        if module != "__init__"
    }


def test_every_module_stands_in_the_picture() -> None:
    drawn = [name for layer in layers() for name in layer]
    assert len(drawn) == len(set(drawn))
    assert set(drawn) - {"gensr", "data_shards"} == set(trainer_graph())


def test_nothing_imports_the_front_door() -> None:
    users = {
        relative(path) for path in sources() for name, _ in imports(path) if name.split(".")[0] == "gensr"
    }
    assert {name for name in users if not name.startswith("gensr/")} == set()
    assert layers()[0] == {"gensr"}


def test_imports_point_down() -> None:
    level = {name: number for number, layer in enumerate(layers()) for name in layer}
    upward = [
        f"{module} imports {wanted}"
        for module, all_wanted in trainer_graph().items()
        for wanted in all_wanted
        if level[wanted] < level[module]
    ]
    assert not upward


def test_no_circles() -> None:
    remaining = trainer_graph()
    while free := [module for module, wanted in remaining.items() if not wanted & set(remaining)]:
        for module in free:
            del remaining[module]
    assert not remaining


@pytest.mark.parametrize(
    "path", [p for p in sources() if p.is_relative_to(ROOT / "data_shards")], ids=relative
)
def test_data_shards_stands_alone(path: Path) -> None:
    roots = {name.split(".")[0] for name, _ in imports(path)}
    assert not roots & {"trainer", "torch", "transformers", "accelerate", "deepspeed", "mlflow"}


@pytest.mark.parametrize(
    "path", [p for p in sources() if p.is_relative_to(ROOT / "trainer" / "models")], ids=relative
)
def test_model_knows_no_files_ranks_or_tracking(path: Path) -> None:
    for name, _ in imports(path):
        root, _, rest = name.partition(".")
        assert root not in ("mlflow", "accelerate", "deepspeed", "webdataset", "pyarrow"), name
        assert not name.startswith("torch.distributed"), name
        if root == "trainer":
            assert rest.split(".")[0] in ("models", "batch", "config", "errors"), name


def test_models_do_not_import_each_other_across_folders() -> None:
    """What gensr/ and baselines/ share lies in layers/, backbones/ or beside them."""
    rooms = {"trainer.models.gensr.": "baselines", "trainer.models.baselines.": "gensr"}
    for prefix, other in rooms.items():
        for path in (ROOT / "trainer" / "models" / other).glob("*.py"):
            assert not [name for name, _ in imports(path) if name.startswith(prefix)], relative(path)
    inner = [*(ROOT / "trainer" / "models" / "layers").glob("*.py")]
    inner += (ROOT / "trainer" / "models" / "backbones").glob("*.py")
    for path in inner:
        assert not [name for name, _ in imports(path) if name.startswith(tuple(rooms))], relative(path)


def test_mlflow_stays_in_its_files() -> None:
    users = {
        relative(path)
        for path in sources()
        for name, typing_only in imports(path)
        if name.split(".")[0] == "mlflow" and not typing_only
    }
    assert users <= MLFLOW_FILES


def loaded_by(package: str, heavy: set[str]) -> str:
    code = f"import sys, {package}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_help_waits_for_no_configuration() -> None:
    assert loaded_by("trainer.cli", {"pydantic", "yaml", "trainer.config"}) == "[]"


@pytest.mark.parametrize("package", ["gensr", "data_shards", "trainer.cli"])
def test_nothing_heavy_before_it_is_needed(package: str) -> None:
    heavy = {"torch", "transformers", "mlflow", "duckdb", "pandas", "deepspeed"}
    assert loaded_by(package, heavy) == "[]"


@pytest.mark.parametrize("package", ["trainer.training.loop", "trainer.serving.recommend"])
def test_who_reads_a_prepared_folder_needs_no_duckdb(package: str) -> None:
    assert loaded_by(package, {"duckdb"}) == "[]"


def test_third_party_imports_are_declared() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = (setup["options"]["install_requires"] + extras["train"] + extras["serve"]).split()
    declared = {re.split(r"[<>=!~\[]", line)[0].lower().replace("_", "-") for line in lines}
    imported = (
        {name.split(".")[0] for path in sources() for name, _ in imports(path)}
        - set(sys.stdlib_module_names)
        - BUILT_IN_PARTS
    )
    names = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in imported}
    assert names <= declared, f"add to setup.cfg: {sorted(names - declared)}"
