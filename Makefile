# make install | demo | test | test-long | test-slurm | test-torture | test-mutants | test-gpu | rehearse-gpu | lint | audit | build | docs. Everything lives in .venv; PYTHON picks the interpreter that makes it (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := gensr trainer data_shards ds_configs
# Workers of one thread each; three on two cores, because tests that start a server or a cluster wait for it, too.
# tests/conftest.py puts files with slow tests first, so that all workers end at about the same time.
PYTEST_ARGS ?= -n 3 --dist loadfile --no-loadscope-reorder

export TOKENIZERS_PARALLELISM ?= false
export MLFLOW_DISABLE_TELEMETRY ?= true
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test test-long test-slurm test-torture test-mutants test-gpu rehearse-gpu lint audit format build clean docs

install: $(STAMP)

# Byte code is written here, on all cores, which takes half as long as pip: where nothing else may write it (a
# read-only folder, PYTHONDONTWRITEBYTECODE), every command would compile PyTorch again.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e .[dev]
	$(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib $(PACKAGES) || true
	touch $@

demo: install
	$(BIN)/gensr demo

test: export OMP_NUM_THREADS ?= 1
test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# What takes minutes a test: whole trainings on real data, killed again and again
test-long: export OMP_NUM_THREADS ?= 1
test-long: install
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

# tests/slurm with every fault: some minutes on free cores, and one after the other, because they share a cluster
test-slurm: export OMP_NUM_THREADS ?= 1
test-slurm: install
	$(BIN)/python -m pytest -m slurm -rP tests/slurm

# Two thousand damaged files, read-only folders, full disks, little memory (root for those that mount), and
# clients that stall: a share of it is in `make test`. A quarter of an hour on a free core
test-torture: export OMP_NUM_THREADS ?= 1
test-torture: install
	$(BIN)/python -m tests.torture.run
	$(BIN)/python -m pytest tests/integration/test_slow_clients.py tests/torture

# Bugs put in on purpose: each must fail the tests that know of it. Twenty minutes on a free core
test-mutants: export OMP_NUM_THREADS ?= 1
test-mutants: install
	$(BIN)/python -m tests.mutants.run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What only a GPU can show; every other test hides them
test-gpu: export GENSR_TEST_GPU = 1
test-gpu: install
	$(BIN)/python -m pytest -rP tests/gpu

# Every part of benchmarks/gpu_session.sh at tiny sizes, without a GPU (docs/gpu.md). PYTHON312=python3.12 does it
# in .venv-gpu, with the packages of a GPU machine; the rest comes from benchmarks/wheels, as there.
REHEARSED := $(if $(PYTHON312),.venv-gpu,$(VENV))
rehearse-gpu: export OMP_NUM_THREADS ?= 1
rehearse-gpu: $(REHEARSED)/.installed
	CUDA_VISIBLE_DEVICES= PIP_NO_INDEX=1 PYTHON=$(CURDIR)/$(REHEARSED)/bin/python \
		benchmarks/gpu_session.sh runs/rehearse-gpu --minutes 9 --rehearse

.venv-gpu/.installed: benchmarks/gpu_machine.txt benchmarks/gpu_wheels.sh constraints.txt
	test -x .venv-gpu/bin/python || $(PYTHON312) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install -r benchmarks/gpu_machine.txt
	PYTHON=.venv-gpu/bin/python benchmarks/gpu_wheels.sh
	touch $@

# Known holes in the pinned versions; needs the vulnerability database of PyPI. pip-audit also succeeds where
# it could look up nothing (an index without the packages, local versions): that is a failure here.
define COUNT_AUDITED
import json, sys
packages = json.load(open(sys.argv[1]))["dependencies"]
skipped = [f"{package['name']}: {package['skip_reason']}" for package in packages if "skip_reason" in package]
print(f"{len(packages) - len(skipped)} of {len(packages)} packages were audited", *skipped, sep="\n  ")
sys.exit(not packages or bool(skipped))
endef
export COUNT_AUDITED

audit: install
	$(BIN)/python -m pip install -q 'pip-audit>=2.7'
	rm -f $(VENV)/audit.json
	$(BIN)/pip-audit --no-deps --disable-pip --progress-spinner off -f json -o $(VENV)/audit.json -r constraints.txt \
		|| { cat $(VENV)/audit.json; exit 1; }
	$(BIN)/python -c "$$COUNT_AUDITED" $(VENV)/audit.json

# The site of docs/ in site/, with the reference made from the code
docs: install
	$(BIN)/python -m pip install -q -c constraints.txt -e .[docs]
	$(BIN)/mkdocs build --strict

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: install
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
