# `make demo` and `make test` do everything on a fresh machine, set-up included. Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Arguments for a first `pip install`, where the default torch is the wrong one. Without an NVIDIA GPU, for instance:
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?=
# What the tests use beside the package itself; those of a missing extra skip, and say so.
EXTRAS ?= test,docs,export,plot,metrics,llamacpp,serve
CHECKED := remoe_adapt triton_kernels $(foreach folder,examples benchmarks docs .ci,$(if $(wildcard $(folder)/*.py),$(folder)))

# The tool's news about its own future are no fault of a page.
DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.PHONY: demo test check docs lowest newest install clean

demo: $(VENV)/.installed
	$(BIN)/remoe demo

# Bare pytest: `python -m pytest` would put this folder, and with it triton_kernels, on the import path.
test: $(VENV)/.installed-test
	$(BIN)/pytest

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CHECKED)
	$(DOCS) build --strict --quiet

# The documentation as a site, in site/index.html.
docs: $(VENV)/.installed-test
	$(DOCS) build --strict

# What we rely on in transformers and peft, on the lowest versions that pyproject.toml admits, and on the newest releases.
# `make newest RAISE=1` admits a newer release on which it holds.
lowest: $(VENV)/.installed-test
	$(BIN)/python .ci/versions.py lowest

newest: $(VENV)/.installed-test
	$(BIN)/python .ci/versions.py newest $(if $(RAISE),--raise)

install: $(VENV)/.installed

# The stamps make repeated calls quick; a changed pyproject.toml installs again.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "remoe-adapt needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
