# SPDX-License-Identifier: Apache-2.0
# make demo       set up, then quantize and lower the bundled model and measure what comes out
# make test       set up, then ruff, mypy, the C++ tests and pytest
# make test-all   make test, and the slow tier: sanitizers, Arm's kernels, other runtime versions, long runs
# make arm        the C++ tests on emulated Arm processors
# make clean      remove what the above made

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# Quiet: pip warns about what a user of ours can do nothing about; errors are shown.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
SOURCES := pyproject.toml $(shell find mossquant calibration kernels targets eval -type f \
  -not -name '*.so' -not -name '*.pyc' 2>/dev/null | grep -v -e __pycache__ -e partial-)
export PYTHONDONTWRITEBYTECODE := 1
# The installed package is what is tested: without this, the folder that make runs in would be imported instead.
export PYTHONSAFEPATH := 1

.PHONY: demo test test-all lint cpp-test sanitized arm clean check-tools

demo: $(VENV)/.installed
	$(BIN)/mossquant demo -o demo

# Two processes of one thread each; what is slow to make they share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test:
	$(MAKE) -j 2 lint cpp-test
	$(PYTEST) -m "not slow"

test-all:
	$(MAKE) -j 2 lint cpp-test sanitized $(ARM)
	$(PYTEST)
	@$(if $(ARM),,echo "$(ARM_MISSING)")

sanitized: $(VENV)/.tools
	$(BIN)/cmake -G Ninja -S kernels -B build/sanitized -DMOSS_PYTHON=OFF -DMOSS_TESTS=ON -DMOSS_SANITIZE=ON >/dev/null
	$(BIN)/cmake --build build/sanitized
	build/sanitized/kernels_tests

# Empty where what it takes is missing: then `make arm` fails, and `make test-all` ends with the line that says so.
QEMU := $(shell command -v qemu-aarch64-static || command -v qemu-aarch64)
ARM := $(if $(QEMU),$(if $(shell command -v aarch64-linux-gnu-g++),arm))
ARM_MISSING := the kernels for Arm were NOT tested: that takes a cross compiler and an emulator; \
  install them (Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static) and run make arm

# On a processor with all instructions, without i8mm, and without dotprod too; kernels of just these sets must run there.
arm: $(VENV)/.tools
	@$(if $(ARM),,echo "$(ARM_MISSING)" >&2; exit 2)
	$(BIN)/cmake -G Ninja -S kernels -B build/arm -DMOSS_PYTHON=OFF -DMOSS_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static >/dev/null
	$(BIN)/cmake --build build/arm
	$(QEMU) -cpu max build/arm/kernels_tests i8mm dotprod portable scalar
	$(QEMU) -cpu neoverse-n1 build/arm/kernels_tests dotprod portable scalar
	$(QEMU) -cpu cortex-a53 build/arm/kernels_tests portable scalar

lint: $(VENV)/.installed $(VENV)/.tools
	$(BIN)/ruff check .
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml -p mossquant

cpp-test: $(VENV)/.tools
	$(BIN)/cmake -G Ninja -S kernels -B build/cpp-tests -DMOSS_PYTHON=OFF -DMOSS_TESTS=ON >/dev/null
	$(BIN)/cmake --build build/cpp-tests
	build/cpp-tests/kernels_tests

check-tools:
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { \
	  echo "mossquant needs a C++17 compiler and found none; install one (Debian: apt-get install g++) and run make again" >&2; exit 2; }

# The interpreter: python3.11 if there is one, else any that is new enough, can make a virtual environment and has the
# headers that a C++ module is built with.
USABLE := import os, sys, sysconfig, venv, ensurepip; \
  sys.exit(sys.version_info < (3, 11) or not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
$(VENV)/bin/python: | check-tools
	@for candidate in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
	  if "$$candidate" -c '$(USABLE)' 2>/dev/null; then \
	    echo "creating $(VENV) with $$candidate"; exec "$$candidate" -m venv $(VENV); fi; done; \
	  echo "mossquant needs Python 3.11 or newer with the venv module and headers and found none; install it (Debian: apt-get install python3.11-venv python3.11-dev), or name one: make PYTHON=/path/to/python3.11" >&2; exit 2

# Requirements as pyproject.toml pins them: those of these names, or the test extra.
pinned = $(BIN)/python -c 'import sys, tomllib; \
  project = tomllib.load(open("pyproject.toml", "rb"))["project"]; test = project["optional-dependencies"]["test"]; \
  print(*([r for r in project["dependencies"] + test if r.split("==")[0] in sys.argv[1:]] or test))' $(1)

# torch first and exactly: a range would admit releases that bring gigabytes of CUDA.
$(VENV)/.torch: pyproject.toml | $(VENV)/bin/python
	@echo "setting up $(VENV): PyTorch and the build tools (a minute, and the download of 200 MB)"
	$(call pinned,torch scikit-build-core nanobind cmake ninja) | xargs $(PIP) install
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "setting up $(VENV): mossquant, its kernels, and the runtimes of the targets (a minute or two)"
	$(PIP) install --no-build-isolation "$(CURDIR)[executorch]"
	touch $@

$(VENV)/.tools: $(VENV)/.torch
	@echo "setting up $(VENV): what the tests need"
	$(call pinned,) | xargs $(PIP) install
	touch $@

clean:
	rm -rf $(VENV) build demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
