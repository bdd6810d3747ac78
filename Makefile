# `make demo` and `make test` work from a fresh clone with git, make and Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
ifdef UV
MAKE_VENV = $(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
INSTALL = VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet --constraint requirements.lock
else
MAKE_VENV = test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock
endif

.PHONY: demo test lint format clean

demo: $(VENV)/.installed-agent
	$(BIN)/tailspan demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed-agent: pyproject.toml requirements.lock
	$(MAKE_VENV)
	$(INSTALL) -e '.[agent]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml requirements.lock
	$(MAKE_VENV)
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
