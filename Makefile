# Two commands: `make sweep` answers the embedded study, `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
# Test processes, of one thread each.
JOBS ?= 2
# Tests that start whole processes: commands, notebooks, browsers; those beside lm-evaluation-harness,
# and one of 100,000 rows.
PROCESSES := tests/end_to_end tests/notebooks tests/sweep/test_stock.py tests/annotation/test_browser.py \
	tests/serving/test_browser.py tests/evaluation/benchmarks/test_harness.py tests/data/test_bounded_memory.py
IN_PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
VENV := .venv
BIN := $(VENV)/bin
KERNELS := $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name CMakeLists.txt) qlora_lab/ops/formats.py

.PHONY: sweep test test-processes test-slurm lint sanitize gpu-check kernels-check setup clean

sweep: $(VENV)/.ready
	$(BIN)/python -m qlora_lab.fetch smollm2_135m
	$(BIN)/python -m qlora_lab.sweep +experiment=dataset_quality

test: $(VENV)/.ready-dev
	$(BIN)/python -m qlora_lab.fetch smollm2_135m
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) $(PROCESSES:%=--ignore=%) --ignore=tests/cuda

# Whole commands, stopped and killed, notebooks, browsers, and 20 studies beside Hydra, drawn from SEED: six minutes.
SEED ?= 0
test-processes: $(VENV)/.ready-dev
	QLORA_LAB_EXAMPLES=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-seed=$(SEED) \
		tests/sweep/test_compose_property.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs $(IN_PARALLEL) $(PROCESSES)

# On a SLURM cluster of its own, which needs root and the packages of tests/slurm/install.sh; skipped without them.
test-slurm: $(VENV)/.ready-dev
	QLORA_LAB_SLURM_TESTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/slurm

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The kernels under AddressSanitizer and UBSan: their tests, then FUZZ_S seconds of random calls.
sanitize: $(VENV)/.ready-dev
	PYTHON=$(BIN)/python JOBS=$(JOBS) kernels/sanitize.sh

# Everything that only a GPU can tell, with the Python that has torch for it: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check:
	$(GPU_PYTHON) kernels/bench/gpu_check.py

# The CUDA kernels on a CPU, also under AddressSanitizer and UBSan, and what nvcc makes of them for every GPU: minutes.
kernels-check: $(VENV)/.ready-dev
	QLORA_LAB_SANITIZE=1 QLORA_LAB_GATE=1 $(BIN)/python -m pytest -rs tests/cuda

setup: $(VENV)/.ready

# torch goes first and alone: constraints.txt pins it, so that nothing else chooses its build. Installing builds the
# kernels, against that torch.
$(VENV)/.ready: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
