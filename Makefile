VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_VENV := .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready
PEER := "memory-caching==0.1.0; python_version < '3.13'"

.PHONY: demo evidence test test-all mutants check docs format bench-peers gpu-report clean

demo: $(READY)
	$(BIN)/mc train configs/demo.yaml

# Use JOBS=1 on a machine with one core.
JOBS ?= 2
evidence: $(READY)
	$(BIN)/mc sweep configs/mqar/evidence.yaml --jobs $(JOBS) --recorded docs/evidence/mqar.jsonl
	$(BIN)/mc sweep configs/niah/evidence.yaml --jobs $(JOBS) --recorded docs/evidence/niah.jsonl

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "slow or not slow"

# Mutation tests: each fault must be caught. ONLY='jax-*' selects faults by name; FULL=--full runs
# the whole quick suite if the expected tests pass.
mutants: $(READY)
	$(BIN)/python -m tools.mutants --jobs $(JOBS) $(FULL) $(ONLY)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist worksteal

# The documentation site, in the folder `site`. The reference is read from the source, so its
# environment needs no framework.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

# Peers of `mc bench peers`; memory-caching is installed with the environment.
bench-peers: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check titans-pytorch==0.5.5
	@! command -v nvidia-smi > /dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check flash-linear-attention

# On a machine with a GPU, in an environment with CUDA builds of jax and torch and the extra
# `train`. GPU_REPORT=--tiny tests the report on a CPU.
GPU_PYTHON ?= python3
gpu-report:
	$(GPU_PYTHON) -m tools.gpu_report --out docs/evidence/gpu $(GPU_REPORT)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch is pinned: an open range would install several GB of CUDA packages. memory-caching also
# installs a command `mc`: the package that is installed last provides it.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 $(PEER)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

$(DOCS_READY): pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
