# The only things needed beforehand are Python (>= 3.10) and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help env demo test test-quick test-torch core kills sanitize emulate fuzz lint types check bench gpu study study-gpu docs clean

help: ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

env: $(READY) ## create the development environment in .venv

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: env ## prune, fine-tune and sample a digit model; writes out/demo
	$(BIN)/python examples/demo.py

test: env ## run all tests, 23 to 33 minutes on two cores
	$(BIN)/python -m pytest

test-quick: env ## the tests to run before each commit, about 3 minutes
	$(BIN)/python -m pytest -m "not slow"

# Another torch, e.g. make test-torch TORCH=2.11.0: its own packages are as it asks for them.
TORCH ?= 2.14.1
OTHER := .venv-torch-$(TORCH)

test-torch: ## the tests of test-quick with another torch, in an environment of its own
	$(PYTHON) -m venv $(OTHER)
	grep -vE '^(torch|torchvision|triton|setuptools|nvidia-[a-z0-9-]+)==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --quiet --constraint $(OTHER)/constraints.txt --editable '.[dev]' torch==$(TORCH)
	$(OTHER)/bin/python -m pytest -m "not slow"

core: env ## install the core alone into a fresh environment and use it
	SPARSEDM_FRESH_INSTALL=1 $(BIN)/python -m pytest -n0 tests/test_fresh_install.py

kills: env ## kill a training run 20 times with SIGKILL; it must end the same
	SPARSEDM_KILLS=20 $(BIN)/python -m pytest -n0 -s tests/train/test_kill.py

CXX ?= g++
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all

sanitize: env ## the kernel tests under AddressSanitizer and UBSan
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 SPARSEDM_CXXFLAGS="$(SANITIZE)" \
	$(BIN)/python -m pytest -n0 $(addprefix tests/backends/cpu/,test_kernels.py test_format.py test_emulated_bf16.py)

emulate: env ## the CPU kernels for ARM (by qemu-user) and AMX, emulated
	SPARSEDM_FUZZ=2000 $(BIN)/python -m pytest -n2 tests/backends/cpu/test_neon.py tests/backends/cpu/test_emulated_bf16.py

FUZZ ?= 100000

fuzz: env ## 100,000 random products under AddressSanitizer and UBSan, about half an hour
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 SPARSEDM_CXXFLAGS="$(SANITIZE)" SPARSEDM_FUZZ=$(FUZZ) \
	$(BIN)/python -m pytest -n2 --timeout 0 tests/backends/cpu/test_fuzz.py

lint: env ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env ## mypy --strict on the package
	$(BIN)/mypy

check: lint types test ## everything CI runs

# Options: make bench BENCH="--only models"
BENCH ?=

bench: env ## the CPU benchmarks; writes out/bench. BENCH="--only models" runs a part of the longest
	@mkdir -p out/bench
	$(BIN)/python benchmarks/masks.py --out out/bench/masks.json
	$(BIN)/python benchmarks/mask_ste.py --only op --patterns 2:4 --out out/bench/mask_ste.json
	$(BIN)/python benchmarks/sparse.py --out out/bench/sparse.json --chart out/bench/sparse.png $(BENCH)
	$(BIN)/python benchmarks/threads.py --out out/bench/threads.json
	$(BIN)/python benchmarks/train_step.py --patterns 2:4 --rounds 5 --out out/bench/train_step.json

# A Python whose torch has CUDA; nothing is installed. Options: make gpu GPU="--only models"
GPU_PYTHON ?= python3
GPU ?=
# Options: make study-gpu STUDY="--data train.npz --held-out test.npz --features resnet56.th"
STUDY ?=

gpu: ## the tests and benchmarks that need a CUDA GPU, under 8 minutes; writes out/gpu
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(GPU_PYTHON) -m benchmarks.gpu $(GPU)

study: env ## compare the methods in minutes, on digits; docs/results/methods.md has the real one
	$(BIN)/python benchmarks/methods.py --quick --jobs 2 --out out/study

study-gpu: ## the study of methods on one CUDA GPU, 12 minutes; writes out/study-gpu
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(GPU_PYTHON) benchmarks/methods.py --device cuda \
	--out out/study-gpu $(STUDY)

docs: env ## build the documentation into out/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean: ## remove the environment and everything generated
	rm -rf $(VENV) .venv-torch-* out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
