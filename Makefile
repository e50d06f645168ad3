# Everything runs in .venv, which `make` creates with uv (installed beside it where missing).
# PYTHON must be 3.12 or newer to create it without uv's own interpreters.

PYTHON ?= python3
PLACEMENTS ?= pre post peri
SEED ?= $(shell date +%s)
STUDY ?= learning_rate ablations surroundings longer
JOBS ?= 1
# Can't be resolved with the others: its packages are built beside the torch that is there (docs/install.md).
TRANSFORMER_ENGINE := 2.17.1
VENV := .venv
UV := $(or $(shell command -v uv),$(VENV)-tools/bin/uv)
PY := $(VENV)/bin/python
OTHER := $(VENV)-transformers-4
LLAMA := $(OTHER)/llama-cpp-python
# For test-upstream: Megatron-LM's source, or a version of megatron-core that pip would take; and what to run.
MEGATRON ?=
TESTS ?= tests/patches tests/models
UPSTREAM := $(VENV)-upstream
PURELIB := 'import sysconfig; print(sysconfig.get_paths()["purelib"])'
# Half of all that is installed, and little of it is imported: Python compiles that as it comes.
RARE := site-packages/(.+/)?(tests?|transformers/models|pandas|plotly|pygments|awkward|nltk|mypyc?|setuptools)/
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE
# A folder of tests at a time in each process; tests/folders.py says how many processes.
PYTEST := $(PY) -m pytest --numprocesses logical --maxprocesses 8

# For gpu-check: tests or benchmarks, both if empty; a folder of wheels for a machine without network, whose python3 has torch;
# --rehearse to run it on the CPU.
HALF ?=
WHEELS ?=
FLAGS ?=
RESULTS ?= runs/gpu-check
GPU_PYTHON ?= $(if $(WHEELS),$(PYTHON),$(PY))

.PHONY: quickstart study test test-all test-faults test-gpu test-docker test-llama-cpp test-harness test-cluster test-upstream
.PHONY: gpu-check gpu-wheels parallelism recipes pictures lint style install constraints clean

quickstart: install  ## Train small GPTs from raw text, on the GPU if there is one, and compare them
	$(PY) examples/quickstart/quickstart.py --norm-placement $(PLACEMENTS)

study: install  ## Run the small ones of examples/paper/studies on the CPU, three hours of a core: STUDY, JOBS
	$(PY) examples/quickstart/corpus.py runs/studies/data
	for study in $(STUDY); do \
		$(PY) -m megatron_periln.studies examples/paper/studies/$$study.yaml --jobs $(JOBS) || exit; done

test: style $(OTHER)/installed  ## Lint, and all tests that need no GPU, of which one checks the types
	MEGATRON_PERILN_UV=$(UV) MEGATRON_PERILN_TRANSFORMERS_4=$(OTHER)/bin/python $(PYTEST)

test-all: style  ## The same, and every placement and model in every layout: an hour
	MEGATRON_PERILN_TEST_ALL=1 $(PYTEST)

test-faults: install  ## Kill training ranks at random 30 times, and damage checkpoints: SEED
	MEGATRON_PERILN_FAULT_ROUNDS=30 MEGATRON_PERILN_FAULT_SEED=$(SEED) $(PY) -m pytest tests/faults tests/checkpoints

test-gpu: install  ## The tests that need a GPU
	MEGATRON_PERILN_TEST_DEVICE=cuda MEGATRON_PERILN_TEST_IN_ORDER=1 $(PYTEST) --maxschedchunk 1 tests/gpu

test-docker: install  ## Build the Dockerfile on a stand-in for NVIDIA's image and try it: minutes, and an engine
	MEGATRON_PERILN_TEST_DOCKER=1 $(PY) -m pytest tests/docker

test-llama-cpp: install $(LLAMA)/llama_cpp/lib  ## Convert exports to GGUF and run them; builds llama.cpp: minutes
	MEGATRON_PERILN_LLAMA_CPP=$(OTHER) $(PY) -m pytest tests/convert/test_llama_cpp.py tests/convert/test_gguf.py

test-harness: install  ## Exports in lm-evaluation-harness, which is installed for it alone
	$(UV) run --quiet --no-project --python $(PY) --with 'lm-eval>=0.4.9' --with accelerate python -m pytest tests/convert/test_harness.py

test-cluster: install  ## The batch scripts on a SLURM with three nodes, on this machine: needs root and Debian's SLURM
	MEGATRON_PERILN_TEST_CLUSTER=1 $(PY) -m pytest tests/cluster

test-upstream: install  ## TESTS with another megatron-core beside all else that is installed: MEGATRON (docs/upstream.md)
	$(UV) venv --quiet --allow-existing --python $(PY) $(UPSTREAM)
	$(UV) pip install --quiet --python $(UPSTREAM)/bin/python --no-deps $(or $(MEGATRON),$(error give MEGATRON=))
	$(PY) -c $(PURELIB) >$$($(UPSTREAM)/bin/python -c $(PURELIB))/installed.pth
	PYTHONPATH=. $(UPSTREAM)/bin/python -m pytest $(TESTS)

gpu-check: $(if $(WHEELS),,install)  ## Tests, then benchmarks, on a GPU in 10 minutes: HALF, WHEELS, RESULTS, FLAGS
	$(GPU_PYTHON) benchmarks/gpu_check.py $(if $(HALF),--half $(HALF)) --output $(RESULTS) $(if $(WHEELS),--wheels $(WHEELS)) $(FLAGS)

gpu-wheels:  ## Fetch the wheels that gpu-check needs into WHEELS
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --constraint constraints.txt \
		--dest $(WHEELS) --requirement benchmarks/gpu_wheels.txt

parallelism: install  ## Write docs/parallelism.md from what the layout tests reach
	MEGATRON_PERILN_REPORT=docs/parallelism.md $(PY) -m pytest tests/parallel/test_layouts.py

recipes: install  ## Train all public recipes of tests/recipes, and write docs/recipes.md
	$(PY) -m tests.recipes.page

pictures: install  ## Take docs/images from the last quickstart's report; needs Chromium
	$(PY) -m tests.report.browser "$$(ls -t runs/quickstart/*/report.html | head -n 1)" --output docs/images

lint: style
	$(VENV)/bin/mypy

style: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck --external-sources examples/slurm/*.sh examples/slurm/*.sbatch .ci/run
	$(VENV)/bin/hadolint Dockerfile

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt | $(UV)
	$(UV) venv --quiet --allow-existing $(VENV)
	$(UV) pip install --quiet --python $(PY) --constraints constraints.txt -e '.[dev]'
	$(PY) -m compileall -q -j 0 -x '$(RARE)' $$($(PY) -c $(PURELIB))
	touch $@

$(OTHER)/installed: constraints.txt | $(VENV)/installed  ## With the same torch, from the same cache
	$(UV) venv --quiet --allow-existing $(OTHER)
	$(UV) pip install --quiet --python $(OTHER)/bin/python transformers==4.57.6 sentencepiece \
		$$(grep -E '^(torch|numpy)==' constraints.txt)
	@# What is compiled of the same files; Python takes nothing else.
	there=$$(echo $(CURDIR)/$(OTHER)/lib/python3.*/site-packages) && cd $(VENV)/lib/python3.*/site-packages && \
		find torch numpy sympy -name '*.pyc' -exec cp --link --no-clobber --parents --target-directory "$$there" {} +
	touch $@

# The source has llama.cpp's, with the converter; of that only the library is built.
$(LLAMA)/llama_cpp/lib: $(OTHER)/installed
	$(UV) pip install --quiet --python $(OTHER)/bin/python cmake diskcache pip cyllama==0.7.0
	$(OTHER)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(OTHER) llama-cpp-python==0.3.36
	mkdir -p $(LLAMA)
	tar -x -f $(OTHER)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMA) --strip-components 1
	$(OTHER)/bin/cmake -S $(LLAMA)/vendor/llama.cpp -B $(OTHER)/build -DCMAKE_BUILD_TYPE=Release -DGGML_OPENMP=OFF \
		$(foreach part,COMMON TOOLS TESTS EXAMPLES SERVER,-DLLAMA_BUILD_$(part)=OFF)
	$(OTHER)/bin/cmake --build $(OTHER)/build --target llama --parallel
	cp -r $(OTHER)/build/bin $@

$(VENV)-tools/bin/uv:
	$(PYTHON) -m venv $(VENV)-tools
	$(VENV)-tools/bin/pip install --quiet uv

constraints: | $(UV)  ## Pin the newest versions that fit
	$(UV) pip compile --quiet --upgrade --universal --extra dev --extra sentences \
		--no-header --no-annotate --output-file constraints.txt pyproject.toml
	printf 'transformer-engine%s==$(TRANSFORMER_ENGINE)\n' '' -cu13 -torch >> constraints.txt

clean:
	rm -rf $(VENV) $(VENV)-tools $(OTHER) $(UPSTREAM) .mypy_cache .pytest_cache .ruff_cache
