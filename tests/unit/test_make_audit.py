"""`make audit` with a stand-in for pip-audit: success means that everything was looked up."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GOOD, SKIPPED = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("packages", "passes"), [([GOOD], True), ([GOOD, SKIPPED], False), ([SKIPPED], False), ([], False)]
)
def test_nothing_audited_is_a_failure(tmp_path: Path, packages: list[dict[str, Any]], passes: bool) -> None:
    answer = json.dumps({"dependencies": packages, "fixes": []})
    scripts = {
        "python": f'[ "$2" = pip ] || exec {sys.executable} "$@"',
        "pip-audit": f"while [ $# -gt 0 ]; do [ $1 = -o ] && echo '{answer}' > $2; shift; done; exit 0",
    }
    (tmp_path / "bin").mkdir()
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    stamp = tmp_path / ".installed"
    stamp.touch()
    command = ["make", "-C", str(ROOT), "-o", str(stamp), "audit", f"VENV={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) is passes, done.stderr
    if SKIPPED in packages:
        assert "b: not found" in done.stdout
