VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_VENV := .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready
PEER := "memory-caching==0.1.0; python_version < '3.13'"

.PHONY: demo evidence results test test-all mutants lint check docs format bench-peers gpu-report wheel release-check clean

demo: $(READY)
	$(BIN)/mc demo
	$(BIN)/mc train configs/demo.yaml

# Use JOBS=1 on a machine with one core.
JOBS ?= 2
evidence: $(READY)
	$(BIN)/mc sweep configs/mqar/evidence.yaml --jobs $(JOBS) --recorded docs/evidence/recall.jsonl
	$(BIN)/mc sweep configs/niah/evidence.yaml --jobs $(JOBS) --recorded docs/evidence/niah.jsonl

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "slow or not slow"

# Mutation tests: each fault must be caught. ONLY='jax-*' selects faults by name; FULL=--full runs
# the whole quick suite if the expected tests pass.
mutants: $(READY)
	$(BIN)/python -m tools.mutants --jobs $(JOBS) $(FULL) $(ONLY)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

# The documentation site, in the folder `site`. The reference is read from the source, so its
# environment needs no framework.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

# The tables and pictures of docs/results.md, from docs/evidence/.
results: $(READY)
	$(BIN)/python -m tools.results

# Peers of `mc bench peers`, and of the tests that compare with flash-linear-attention, which needs
# triton also on a CPU; memory-caching is installed with the environment.
bench-peers: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check titans-pytorch==0.5.5
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  flash-linear-attention==0.6.0 fla-core==0.6.0 triton einops

# On a machine with a GPU, with any Python >= 3.11: makes the environment .venv-gpu, and measures for
# 12 minutes. GPU_REPORT=--tiny tests the report on a CPU.
GPU_PYTHON ?= python3
gpu-report:
	$(GPU_PYTHON) -m tools.gpu_report --out docs/evidence/gpu $(GPU_REPORT)

# Builds of a commit are equal byte for byte.
wheel: $(READY)
	$(BIN)/python -m tools.distributions dist
	$(BIN)/twine check --strict dist/*

# Builds twice, and tests the wheel in fresh environments, one per extra. Installs several GB.
release-check: $(READY)
	$(BIN)/python -m tools.release_check

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch is pinned, so that pip prefers a CPU build of this version, where it finds one, to a newer
# build with several GB of CUDA packages. memory-caching also installs a command `mc`: the package
# that is installed last provides it.
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
	rm -rf $(VENV) $(DOCS_VENV) .venv-gpu site .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
