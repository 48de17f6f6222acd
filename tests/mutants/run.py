"""[--only WORD --json FILE]: puts each bug of mutants.py into a copy of the tree and runs the tests that must
notice it.

One after the other in one process each, forked from one that has torch and pytest imported already (the
program is not, so each imports its own bug). Before all, those tests run without a bug: where one fails then,
its failures would say nothing. Prints a line for each, and the survivors. Exit code 1: a bug that no test
noticed, one whose text is not there exactly once, or a test that fails without a bug.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
PACKAGES = ("gensr", "trainer", "data_shards", "tests")
COPIED = (*PACKAGES, "benchmarks", "ds_configs", "setup.cfg", "pyproject.toml")
TIMEOUT_S = 240
CONTROL_TIMEOUT_S = 1800  # of all tests together
# pytest's exit codes: 0 all passed, 1 some failed; anything else says nothing about the bug (2: a test file
# cannot even be imported, 4: no such test)
PASSED, FAILED, TIMED_OUT = 0, 1, -1


def problem_of(mutant: Mutant, root: Path = ROOT) -> str:
    """Why a mutant cannot be applied; "" where it can."""
    text = (root / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return f"{mutant.file} holds its text {text.count(mutant.old)} times"
    try:
        compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    except SyntaxError as error:
        return f"{mutant.file} is no Python with it: {error}"
    return ""


def copy_tree(root: Path, to: Path) -> None:
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(root / name, to / name)


def run_tests(tree: Path, tests: Iterable[str], timeout_s: float = TIMEOUT_S) -> int:
    """pytest's exit code in a fork; TIMED_OUT where it had to be ended."""
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            os.chdir(tree)
            sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
            os.environ["PYTHONPATH"] = str(tree)  # the processes that a test starts have the bug, too
            for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
                del sys.modules[name]
            sys.dont_write_bytecode = True
            with open(tree / "log.txt", "w", encoding="utf-8") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                import pytest

                code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *tests])
        finally:
            os._exit(int(code))
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TIMED_OUT


def verdict(mutant: Mutant, code: int) -> str:
    """killed, survived, equivalent (as it should be), or what went wrong with the run."""
    if code == TIMED_OUT:
        return "killed"  # it hangs: no CI passes
    if code not in (PASSED, FAILED):
        return f"pytest ended with {code}"
    if mutant.equivalent:
        return "equivalent" if code == PASSED else "killed, though it is listed as equivalent"
    return "killed" if code == FAILED else "survived"


def run(mutants: list[Mutant], tree: Path) -> list[dict[str, object]]:
    copy_tree(ROOT, tree)
    for library in ("torch", "pytest", "transformers", "pyarrow.parquet", "hypothesis", "accelerate"):
        __import__(library)
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    started, code = time.monotonic(), run_tests(tree, tests, CONTROL_TIMEOUT_S)
    if code != PASSED:
        said = (tree / "log.txt").read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{said}\nwithout a bug the tests ended with {code}: their failures say nothing")
    print(f"without a bug all tests pass ({time.monotonic() - started:.0f} s)", flush=True)
    rows: list[dict[str, object]] = []
    for number, mutant in enumerate(mutants, start=1):
        started, problem = time.monotonic(), problem_of(mutant)
        if not problem:
            path = tree / mutant.file
            original = path.read_text(encoding="utf-8")
            path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
            result = verdict(mutant, run_tests(tree, mutant.tests))
            path.write_text(original, encoding="utf-8")
        row = {"name": mutant.name, "file": mutant.file, "verdict": problem or result}
        rows.append({**row, "seconds": round(time.monotonic() - started, 1)})
        print(
            f"{number}/{len(mutants)} {row['verdict']}: {mutant.name} ({rows[-1]['seconds']} s)", flush=True
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutants whose name or file holds this")
    parser.add_argument("--json", help="where to write the rows")
    given = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if given.only in m.name or given.only in m.file]
    with tempfile.TemporaryDirectory() as folder:
        rows = run(chosen, Path(folder))
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    wrong = [row for row in rows if row["verdict"] not in ("killed", "equivalent")]
    for verdict_ in ("killed", "equivalent"):
        print(f"{verdict_}: {sum(row['verdict'] == verdict_ for row in rows)} of {len(rows)}")
    for row in wrong:
        print(f"{row['verdict']}: {row['name']} ({row['file']})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
