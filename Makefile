# make quickstart: a draft for a real language model learns, is measured, and comes out in the form that servers load.
# make test: every test that needs no accelerator. make check: format, lint, types, layering.
# make parity: every target family against the installed transformers and torch, for models made there and then; needs
# torch, which it installs. SEED, HIDDEN, LAYERS and ONLY (a regular expression) say which: make parity SEED=3 ONLY=gemma
# make tpu-check: targets and training steps compiled for TPU slices by the TPU compiler, which needs no TPU: memory of
# each chip, estimated time, FLOPs. Installs it.
# make serve-check: a tiny draft is trained, exported and served by vLLM on a CPU: texts and counters of accepted tokens are
# those of jeagle's own decoding, and with a fault planted in the export they are not; the speculators library gives
# its loss, SGLang's class loads it. Installs them. RUN=runs/NAME takes a run of yours, DRAFTS=all every kind of draft and
# runs/quickstart where it is, with the faults in both layouts; ENGINES=vllm asks only that one.
# make kill-check: writers of a store killed at fifty random moments, two at a time; the tests do it at six.
# PYTHON=... chooses the interpreter, ARGS="--train.steps 100" overrides fields of the quickstart's recipe.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
ARGS ?=
SEED ?= 1
HIDDEN ?= 64
LAYERS ?=
ONLY ?=
RUN ?=
DRAFTS ?= small
ENGINES ?= vllm speculators sglang

.PHONY: quickstart test check parity tpu-check serve-check kill-check .venv

quickstart: .venv/installed
	.venv/bin/python -m jeagle.pipeline --config configs/smollm2_135m.py $(ARGS)

test: .venv/installed
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -n 2 --dist loadfile tests

check: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

parity: .venv-parity/installed
	folder="$$(mktemp -d)" && trap 'rm -rf "$$folder"' EXIT && export JAX_PLATFORMS=cpu JEAGLE_TARGET_GOLDENS="$$folder" && \
	.venv-parity/bin/python -m tests.targets.make_goldens --check --out "$$folder" --only '$(ONLY)' \
		--seed $(SEED) --hidden $(HIDDEN) $(if $(LAYERS),--layers $(LAYERS)) && \
	.venv-parity/bin/python -m pytest -q -n 2 tests/targets/test_goldens.py tests/test_doctor.py && \
	.venv-parity/bin/python -m jeagle.doctor --against transformers --target "$$(ls -d "$$folder"/* | head -n 1)"

tpu-check: .venv-tpu/installed
	.venv-tpu/bin/python -m benchmarks.tpu_targets
	.venv-tpu/bin/python -m benchmarks.tpu_kernels
	.venv-tpu/bin/python -m benchmarks.tpu_step

serve-check: .venv/installed $(ENGINES:%=.venv-serve/%-installed)
	JAX_PLATFORMS=cpu .venv/bin/python -m tests.serve $(if $(RUN),--run $(RUN),--drafts $(DRAFTS)) --engines $(ENGINES) $(ARGS)

kill-check: .venv/installed
	JEAGLE_KILLS=50 JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q tests/features/test_kill.py

.venv: .venv/installed

# The stamp comes last, so that an installation that was cut off is not taken for finished. The interpreter is the one
# beneath an active environment, which may be the very one that is made anew.
.venv/installed: EXTRAS = dev
.venv-parity/installed: EXTRAS = dev,parity
.venv-tpu/installed: EXTRAS = dev,tpu
.venv/installed .venv-parity/installed .venv-tpu/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: jeagle needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Installing jeagle with its dependencies into $(@D): about a minute."
	base="$$($(PYTHON) -c 'import sys; print(sys._base_executable)')" && rm -rf $(@D) && "$$base" -m venv $(@D)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

# vLLM's whole closure for a CPU, without the packages that only a GPU needs: hence --no-deps. torch must be the build for
# CPUs, which pip takes by itself where an index or folder in its configuration has it.
.venv-serve/vllm-installed: tests/serve/requirements-vllm.txt
	@echo "Installing vLLM for CPUs into $(@D): two minutes, 2.5 GB."
	base="$$($(PYTHON) -c 'import sys; print(sys._base_executable)')" && rm -rf $(@D) && "$$base" -m venv $(@D)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/pip install -q --no-deps -r $<
	@$(@D)/bin/python -c 'import torch' || \
		{ echo "error: torch does not start: give pip an index that has its build for CPUs (PIP_EXTRA_INDEX_URL)" >&2; exit 2; }
	touch $@

# Beside vLLM's packages, not among them, so that vLLM finds no more than it came with.
.venv-serve/%-installed: tests/serve/requirements-%.txt .venv-serve/vllm-installed
	@echo "Installing $* into $(@D)/$*."
	rm -rf $(@D)/$* && PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/pip install -q --no-deps --target $(@D)/$* -r $<
	touch $@
