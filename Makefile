# make quickstart    trains, measures and exports a draft for a real language model.
# make test          runs every test that needs no accelerator, and prints the 25 slowest.
# make check         checks format, lint, types and layering.
# make parity        compares every target family with the installed transformers and torch, on models that are created at that
#                    moment. It installs torch. SEED, HIDDEN, LAYERS and ONLY (a regular expression) choose the models:
#                    make parity SEED=3 ONLY=gemma
# make tpu-check     compiles targets and training steps for TPU slices with the TPU compiler, which it installs. No TPU is
#                    needed. It prints the memory of each chip, the estimated time and the FLOPs.
# make serve-check   trains and exports a tiny draft and serves it in vLLM on a CPU. Texts and counters of accepted tokens must
#                    equal those of jeagle's own decoding, and must differ when the export has a fault. The speculators library
#                    must compute jeagle's loss, and SGLang's class must load the export. All three are installed.
#                    RUN=runs/NAME checks a run of yours. DRAFTS=all checks every kind of draft, and runs/quickstart if it
#                    exists, with the faults in both layouts. ENGINES=vllm checks that engine alone.
# make kill-check    kills writers of a store at fifty random moments, two at a time; the tests do so at six.
#
# PYTHON=... chooses the interpreter. ARGS="--train.steps 100" overrides settings of the quickstart's recipe.

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
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -n 2 --dist loadfile --durations=25 tests

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

# The stamp is written last, so that an interrupted installation does not count as finished. The interpreter is the one
# below an active environment, because that environment may be the one that is created again.
.venv/installed: EXTRAS = dev
.venv-parity/installed: EXTRAS = dev,parity
.venv-tpu/installed: EXTRAS = dev,tpu
.venv/installed .venv-parity/installed .venv-tpu/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: jeagle needs Python 3.11 or newer, and '$(PYTHON)' is older. Use make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Installing jeagle and its dependencies into $(@D). This takes about a minute."
	base="$$($(PYTHON) -c 'import sys; print(sys._base_executable)')" && rm -rf $(@D) && "$$base" -m venv $(@D)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

# The requirements list all dependencies of vLLM on a CPU, without the packages that only a GPU needs; therefore --no-deps.
# torch must be the build for CPUs, which pip chooses if an index or a folder in its configuration has it.
.venv-serve/vllm-installed: tests/serve/requirements-vllm.txt
	@echo "Installing vLLM for CPUs into $(@D). This takes two minutes and 2.5 GB."
	base="$$($(PYTHON) -c 'import sys; print(sys._base_executable)')" && rm -rf $(@D) && "$$base" -m venv $(@D)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/pip install -q --no-deps -r $<
	@$(@D)/bin/python -c 'import torch' || \
		{ echo "error: torch cannot be imported. Give pip an index with its build for CPUs (PIP_EXTRA_INDEX_URL)." >&2; exit 2; }
	touch $@

# The other engines are installed beside vLLM's packages and not among them, so that vLLM finds nothing else.
.venv-serve/%-installed: tests/serve/requirements-%.txt .venv-serve/vllm-installed
	@echo "Installing $* into $(@D)/$*."
	rm -rf $(@D)/$* && PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/pip install -q --no-deps --target $(@D)/$* -r $<
	touch $@
