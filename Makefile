# make quickstart: a draft for a real language model learns, is measured, and comes out in the form that servers load.
# make test: every test that needs no accelerator. make check: format, lint, types, layering.
# PYTHON=... chooses the interpreter, ARGS="--train.steps 100" overrides fields of the quickstart's recipe.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
ARGS ?=

.PHONY: quickstart test check .venv

quickstart: .venv/installed
	.venv/bin/python -m jeagle.pipeline --config configs/smollm2_135m.py $(ARGS)

test: .venv/installed
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -n 2 tests

check: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

.venv: .venv/installed

# The stamp comes last, so that an installation that was cut off is not taken for finished. The interpreter is the one
# beneath an active environment, which may be the very one that is made anew.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: jeagle needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Installing jeagle with its dependencies into .venv: about a minute."
	base="$$($(PYTHON) -c 'import sys; print(sys._base_executable)')" && rm -rf .venv && "$$base" -m venv .venv
	PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
