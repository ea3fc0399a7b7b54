# Each target does its own set-up in .venv, once; a stamp file remembers it. Nothing is installed outside this folder.
#
#   make demo        quantise the small model, gate its quality, time Qwen3-0.6B shapes, one table     (8 min, 2 cores)
#   make test        everything that needs no card                                                    (14 min, 2 cores)
#   make test-full   the whole product of cases                                                       (75 min, 2 cores)
#   make test-gpu    conformance of every Triton body on the card that is there
#   make inspect-page  writes docs/inspect.md: what the compiler makes of the kernels, no card needed
#   make lint        ruff, clang-format, mypy on the installed wheel
#   make bench       tests/benchmarks: ops, a decode step and codecs, checked and then timed           (2 min, 2 cores)
#   make clean       removes .venv and everything built
#
# Variables: PYTHON=python3.12, TORCH=torch==2.13.0 (a development pin: the package itself accepts any torch),
# TRITON=triton==3.9.0, JOBS=2 (parallel test processes), DEMO_FLAGS=--quick,
# BENCH_FLAGS='--benchmark-save=before', then BENCH_FLAGS='--benchmark-compare --benchmark-compare-fail=median:20%'.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
VENV := .venv
BIN := $(VENV)/bin
OLD_TRITON := $(VENV)/triton-3.6.0
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n < 8 ? n : 8 )))
DEMO_FLAGS ?=
BENCH_FLAGS ?= --benchmark-columns=median,iqr,min,rounds --benchmark-sort=fullname

PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# Directories count too: their time changes when a file comes or goes.
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc formats kernels quant bench src -mindepth 1 \
	-not -path 'bench/results*' -not -name '__pycache__' -not -name '*.pyc' 2>/dev/null)
CPP := $(wildcard csrc/*.h csrc/*.cpp kernels/*/*.cpp kernels/*/*.h)

# Tests run in parallel processes, so each of them gets one thread; tests that share something slow stay together.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

.PHONY: help demo test test-full test-gpu inspect-page lint format bench clean setup

help:
	@sed -n '3,13s/^# \{0,1\}//p' Makefile

setup: $(VENV)/.installed

# 1. An environment with torch, Triton and what builds the C++ module (cmake and ninja come from pip).
$(VENV)/.tools: Makefile
	@fail() { echo "make: $$*" >&2; exit 1; }; \
	command -v $(PYTHON) >/dev/null || fail "$(PYTHON) is not there; install Python 3.11 or newer (apt install python3), or name one: make PYTHON=python3.12"; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$(PYTHON) is $$($(PYTHON) -V); percard needs 3.11 or newer: make PYTHON=python3.12"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || fail "$(PYTHON) has no venv module; apt install python3-venv"; \
	[ -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || fail "Python.h is missing; apt install python3-dev"; \
	command -v $${CXX:-g++} >/dev/null || fail "no C++ compiler ($${CXX:-g++}); apt install g++, or name one: CXX=clang++ make"
	@echo "make: set-up 1 of 2: $(TORCH), $(TRITON) and build tools into $(VENV) (once)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) install '$(TORCH)' 'scikit-build-core>=0.11' 'nanobind>=2.4' cmake ninja pytest-xdist
	@[ "$$(uname -s)" != Linux ] || $(PIP) install '$(TRITON)'
	@touch $@

# 2. percard itself, as a wheel and not editable: tests and mypy then see exactly what a user gets.
$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	@echo "make: set-up 2 of 2: percard, its C++ module and the development extras"
	@PATH="$$PWD/$(BIN):$$PATH" $(PIP) install --no-build-isolation '.[bench,quant,hub,test]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/percard demo --out out/demo $(DEMO_FLAGS)

test: $(VENV)/.installed
	$(PYTEST)

test-full: $(VENV)/.installed $(OLD_TRITON)
	PERCARD_TRITON=$$PWD/$(OLD_TRITON) $(PYTEST) -m 'not gpu and not bench'

# The oldest Triton that the kernels support, beside the installed one, with the numpy that its interpreter needs;
# percard inspect --triton reads it.
$(OLD_TRITON): | $(VENV)/.tools
	-@rm -rf $@.part && $(PIP) install --no-deps --target $@.part triton==3.6.0 'numpy<2.4' && mv $@.part $@

inspect-page: $(VENV)/.installed $(OLD_TRITON)
	$(BIN)/python -m percard.kernels.inspection --page docs/inspect.md --triton $(OLD_TRITON)

test-gpu: $(VENV)/.installed
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { \
	echo "make test-gpu: torch $$($(BIN)/python -c 'import torch; print(torch.__version__)') sees no CUDA card; run it on a host with an NVIDIA driver (nvidia-smi answers) and a CUDA build of torch. Without a card, make test proves the Triton bodies under the interpreter." >&2; exit 3; }
	$(BIN)/python -m pytest -m gpu

bench: $(VENV)/.installed
	$(BIN)/python -m pytest -m bench --benchmark-only $(BENCH_FLAGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))
	$(BIN)/mypy -p percard

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
