# Everything runs in .venv, which `make` creates with uv (installed beside it where missing).
# PYTHON must be 3.12 or newer to create it without uv's own interpreters.

PYTHON ?= python3
PLACEMENTS ?= pre post peri
STUDY ?= learning_rate
JOBS ?= 1
VENV := .venv
UV := $(or $(shell command -v uv),$(VENV)-tools/bin/uv)
PY := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1

# For gpu-check: a folder of wheels for a machine without network, whose python3 has torch; cpu for a dry run.
WHEELS ?=
DEVICE ?= cuda
RESULTS ?= runs/gpu-check
GPU_PYTHON ?= $(if $(WHEELS),$(PYTHON),$(PY))

.PHONY: quickstart study test test-all test-gpu gpu-check gpu-wheels parallelism pictures lint install constraints clean

quickstart: install  ## Train small GPTs from raw text, on the GPU if there is one, and compare them
	$(PY) examples/quickstart/quickstart.py --norm-placement $(PLACEMENTS)

study: install  ## Run one of examples/paper/studies on the CPU, half an hour on a core: STUDY, JOBS
	$(PY) examples/quickstart/corpus.py runs/studies/data
	$(PY) -m megatron_periln.experiments examples/paper/studies/$(STUDY).yaml --jobs $(JOBS)

test: lint  ## Lint, types and all tests that need no GPU
	$(PY) -m pytest

test-all: lint  ## The same, and every placement and model in every layout: an hour
	MEGATRON_PERILN_TEST_ALL=1 $(PY) -m pytest

test-gpu: install  ## The tests that need a GPU
	MEGATRON_PERILN_TEST_DEVICE=cuda $(PY) -m pytest tests/gpu

gpu-check: $(if $(WHEELS),,install)  ## All tests and benchmarks for the GPU, in 20 minutes: WHEELS, DEVICE, RESULTS
	$(GPU_PYTHON) benchmarks/gpu_check.py --device $(DEVICE) --output $(RESULTS) $(if $(WHEELS),--wheels $(WHEELS))

gpu-wheels:  ## Fetch the wheels that gpu-check needs into WHEELS
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --constraint constraints.txt \
		--dest $(WHEELS) --requirement benchmarks/gpu_wheels.txt

parallelism: install  ## Write docs/parallelism.md from what the layout tests reach
	MEGATRON_PERILN_REPORT=docs/parallelism.md $(PY) -m pytest tests/parallel/test_layouts.py

pictures: install  ## Take docs/images from the last quickstart's report; needs Chromium
	$(PY) -m tests.report.browser "$$(ls -t runs/quickstart/*/report.html | head -n 1)" --output docs/images

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt | $(UV)
	$(UV) venv --quiet --allow-existing $(VENV)
	$(UV) pip install --quiet --python $(PY) --compile-bytecode --constraints constraints.txt -e '.[dev]'
	touch $@

$(VENV)-tools/bin/uv:
	$(PYTHON) -m venv $(VENV)-tools
	$(VENV)-tools/bin/pip install --quiet uv

constraints: | $(UV)  ## Pin the newest versions that fit
	$(UV) pip compile --quiet --upgrade --universal --extra dev --extra sentences \
		--no-header --no-annotate --output-file constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) $(VENV)-tools .mypy_cache .pytest_cache .ruff_cache
