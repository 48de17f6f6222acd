#!/usr/bin/env bash
# gpu_wheels.sh [FOLDER]: fills the folder of wheels (default benchmarks/wheels) that gpu_session.sh installs from,
# for Python 3.12 on x86-64 Linux, with the versions of constraints.txt; prints its size and fails above 45 MiB.
# Not in it: MLflow, optuna, SQLAlchemy (no GPU path needs them), bitsandbytes (too large: 4 bits are
# then skipped), and what such a machine has (torch, transformers, accelerate, peft, pyarrow, scipy, pandas, ...).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
folder=${1:-$here/wheels}
limit_mib=45
names=(annotated-doc annotated-types bm25s braceexpand einops faiss-cpu fastapi hjson importlib_metadata iniconfig
  msgpack ninja nvidia-ml-py opentelemetry-api pluggy py-cpuinfo pydantic pydantic_core pytest pytest-timeout
  starlette typing-inspection uvicorn webdataset zipp) # anyio, h11, idna and psutil come with transformers and accelerate
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux_2_12 manylinux2014 manylinux2010 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
requirements=()
for name in "${names[@]}"; do
  pin=$(grep -i "^$name==" "$here/../constraints.txt") || { echo "$name is not in constraints.txt" >&2; exit 1; }
  requirements+=("${pin%%;*}")
done
requirements+=(duckdb==1.3.2) # 2.0 is larger: with it and faiss the folder would be above the limit
mkdir -p "$folder"
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" -d "$folder" "${requirements[@]}"
# DeepSpeed is published as source; built without its operators it is the same wheel for every Python and card.
if ! compgen -G "$folder/deepspeed-*.whl" >/dev/null; then
  deepspeed=$(grep "^deepspeed==" "$here/../constraints.txt")
  DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$folder" "$deepspeed"
fi
bytes=$(cat "$folder"/*.whl | wc -c)
ls -l "$folder"
echo "$((bytes / 1048576)) MiB of $limit_mib MiB in $folder"
((bytes <= limit_mib * 1048576)) || { echo "too large: leave out a name above" >&2; exit 1; }
