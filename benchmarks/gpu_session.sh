#!/usr/bin/env bash
# gpu_session.sh OUT [--minutes 9] [--rehearse] [--data FOLDER] [--keep FOLDER] [--only PART ...]: everything
# about GPUs measured on a machine without a network (docs/gpu.md). Packages that are missing come from the
# folder of wheels that gpu_wheels.sh made (GENSR_WHEELS, else benchmarks/wheels). PYTHON picks the interpreter.
set -euo pipefail
started=$(date +%s) # --minutes counts the installing below, too
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
wheels=${GENSR_WHEELS:-$here/wheels}
if [[ $# == 0 || $1 == -* ]]; then
  echo "usage: $0 OUT [--minutes 9] [--rehearse] [--data FOLDER] [--keep FOLDER] [--only PART ...]" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
site=$out/work/site
mkdir -p "$site"
if [[ -d $wheels ]]; then
  # What is there keeps its version: the wheel of another would hide it.
  mapfile -t missing < <("$python" - "$wheels" <<'PY'
import importlib.metadata, pathlib, sys
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
PY
)
  if ((${#missing[@]})); then
    # without pip, or with a wheel that it refuses, they are unpacked: only what imports an unfit one fails then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "${missing[@]}" ||
      for wheel in "${missing[@]}"; do "$python" -m zipfile -e "$wheel" "$site"; done
  fi
fi
cd "$here/.."
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$out/work/extensions}"
bin=$(dirname "$(command -v "$python")")
export PATH="$bin:$site/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE # each part is a process: without compiled files torch alone takes seconds more
exec "$python" -m benchmarks.gpu.session "$out" --started "$started" "$@"
