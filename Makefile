# Each target makes the environment that it needs (in .venv) and then does its job; a second run finds it there.
#
#   make demo              embed a section of real tissue, find and learn its regions; figures and .h5ad in demo/
#   make demo DATA=x.h5ad  the same with your own slice (several: LIBRARY_KEY=sample)
#   make demo SIMULATE=1   the same with a simulated one
#   make test              the tests          (ARGS="-k genes" goes to pytest)
#   make test-newest       a part of the tests on the newest Python there is, in ~/.cache/stofm
#   make test-oldest       the same part with the oldest versions that pyproject.toml allows, in ~/.cache/stofm
#   make test-latest       all tests with the newest releases of everything, in ~/.cache/stofm
#   make check             lint and types
#   make docs              the documentation, in docs/_build/html
#   make wheel             the wheel, in dist/; embeds a section with it in an environment of its own
#   make bench             speed and memory against a plain implementation
#   make install           the environment of all of these at once
#   make clean             remove the environment and everything that was built
#
# PYTHON=... names the interpreter to build the environment with, VENV=... its folder.

VENV ?= .venv
DEMO ?= demo
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
EXE := .exe
else
BIN := $(VENV)/bin
endif
# How packages are installed: with the versions that were tested together.
PIP_INSTALL ?= $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The newest comes last, also of those that pyenv keeps.
NEWER := $(or $(PYTHON),python3.12 python3.13 python3.14 $(wildcard $(HOME)/.pyenv/versions/3.*/bin/python3))
NEWEST = $(or $(shell for python in $(NEWER); do \
  $$python -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null; \
done | sort -V | tail -n 1),$(error None of these is there: $(NEWER)))
QUICK := tests/test_*.py tests/datasets tests/edge tests/pl tests/pp tests/heads/test_head.py \
  $(addprefix tests/tl/test_, \
  annotate.py deconvolve.py domains.py embed.py encode_cells.py impute.py train.py)
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python)

# No target opens a window.
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help demo test test-newest test-oldest test-latest check docs wheel bench clean install

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.installed
	$(BIN)/python -m stofm demo --overwrite --out "$(DEMO)" $(if $(DATA),--data "$(DATA)") \
	  $(if $(LIBRARY_KEY),--library-key "$(LIBRARY_KEY)") $(if $(SIMULATE),--simulate)

# As many processes as there are processors, each with one thread. A file's tests are run by one of
# them, which makes what they share once.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 \
	  --dist loadfile $(ARGS)

# Its environment lies outside the clone: it takes 6 GB where pip finds torch with CUDA only. Each
# time it is told where this clone lies.
test-newest: NEWEST_VENV = $(HOME)/.cache/stofm/python$(firstword $(NEWEST))
test-newest:
	@rm -f "$(NEWEST_VENV)/.installed-test"
	@$(MAKE) test PYTHON="$(lastword $(NEWEST))" VENV="$(NEWEST_VENV)" ARGS="$(QUICK) $(ARGS)"

# Direct dependencies at their lower bounds, the others as they were at that time; what those
# releases warn of is no error. Needs uv.
test-oldest: OLDEST_VENV = $(HOME)/.cache/stofm/oldest
test-oldest:
	@rm -f "$(OLDEST_VENV)/.installed-test"
	@$(MAKE) test VENV="$(OLDEST_VENV)" ARGS="-W default $(QUICK) $(ARGS)" PIP_INSTALL="uv pip install --quiet \
	  --python $(OLDEST_VENV) --resolution lowest-direct --exclude-newer 2025-05-01"

test-latest: LATEST_VENV = $(HOME)/.cache/stofm/latest
test-latest:
	@rm -f "$(LATEST_VENV)/.installed-test"
	@$(MAKE) test VENV="$(LATEST_VENV)" \
	  PIP_INSTALL="$(LATEST_VENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager"

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.installed-doc
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -j auto -b html docs docs/_build/html $(ARGS)

# The built-in model and the section are in the wheel, so the quick start needs nothing else.
wheel: $(BIN)/pip$(EXE)
	rm -rf dist build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(BIN)/python -m venv build/wheel
	build/wheel/$(notdir $(BIN))/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && wheel/$(notdir $(BIN))/python -m stofm demo --overwrite --out wheel/demo

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/speed.py $(ARGS)

clean:
	rm -rf "$(VENV)" build dist "$(DEMO)" docs/_build docs/tutorials docs/generated \
	  benchmarks/results .pytest_cache .mypy_cache .ruff_cache .hypothesis

# venv writes pip last, so a half-made environment is made again.
$(BIN)/pip$(EXE):
	@for python in $(CANDIDATES); do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$($$python --version)"; \
	    exec $$python -m venv "$(VENV)"; \
	  fi; \
	done; \
	echo "stofm needs Python 3.11 or newer with venv, and none of these is one: $(CANDIDATES)." >&2; \
	echo "Install it (Debian and Ubuntu: apt install python3.11-venv) or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

# .installed, .installed-test, .installed-dev, .installed-doc: the package with that extra.
$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-dev $(VENV)/.installed-doc: \
  $(VENV)/.installed%: $(BIN)/pip$(EXE) pyproject.toml constraints.txt
	@echo "Installing stofm$(if $*,[$(*:-%=%)]) into $(VENV); the first time takes some minutes"
	@$(PIP_INSTALL) -e ".$(if $*,[$(*:-%=%)])"
	@touch $@

# pip finds versions for all extras at once sooner than for one after the other.
install: $(BIN)/pip$(EXE)
	@echo "Installing stofm[dev,doc] into $(VENV); the first time takes some minutes"
	@$(PIP_INSTALL) -e ".[dev,doc]"
	@touch $(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-dev $(VENV)/.installed-doc
