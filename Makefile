# Each target sets up what it needs, from a bare clone with Python >= 3.10:
#
#   make demo       a real Llama with its v_proj in INT8, what it costs and what it saves
#   make test       the tests; those that need a GPU are skipped where there is none
#   make gpu-test   the tests that need a GPU, and fails where there is none
#   make sanitize   compute-sanitizer's memcheck, racecheck, initcheck and synccheck over every CUDA
#                   kernel; fails where there is no GPU or no compute-sanitizer
#   make lint       ruff, mypy, clang-format and the house rules
#   make format     lets ruff and clang-format rewrite what `make lint` would object to
#   make build      the extension, in place
#   make clean      removes what was built; the environment stays
#
# The interpreter is PYTHON if given (make test PYTHON=python3), else that of the active virtual
# environment, else that of .venv, which is made. Only what it lacks is installed.
# DEMO_ARGS and PYTEST_ARGS are passed on. COMPUTE_SANITIZER names the sanitizer, if it is neither on
# PATH nor in the toolkit of CUDA_HOME (/usr/local/cuda).

ifdef PYTHON
PY := $(PYTHON)
else ifdef VIRTUAL_ENV
PY := $(VIRTUAL_ENV)/bin/python
else
PY := .venv/bin/python
NEW_ENVIRONMENT := .venv/bin/python
endif

# The package is used from this folder, where it is built in place.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export PYTHONUNBUFFERED := 1

COMPUTE_SANITIZER ?= compute-sanitizer

# The time of the GPU tests goes into compiling, on the host: spread them where pytest-xdist is there.
GPU_TEST_JOBS ?= $(shell $(PY) -c 'import os, xdist; print("-n", min(14, os.cpu_count()), "--dist worksteal")' 2>/dev/null)

.PHONY: demo test gpu-test sanitize lint format build clean
.DEFAULT_GOAL := build

define need-device
$(PY) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	f"make $@ needs a CUDA device, and torch {torch.__version__} sees none")'
endef

demo: set-up-demo
	$(PY) -m int8_ops demo $(DEMO_ARGS)

test: set-up-test
	$(PY) scripts/check_house_rules.py
	$(PY) -m pytest $(PYTEST_ARGS)

gpu-test: set-up-gpu-test
	@$(need-device)
	$(PY) -m pytest -m gpu $(GPU_TEST_JOBS) $(PYTEST_ARGS)

# Each tool's own exit status tells nothing of what it found, unless asked to.
sanitize: set-up-build
	@$(need-device)
	@PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin"; \
	command -v "$(COMPUTE_SANITIZER)" >/dev/null || { \
		echo "make sanitize needs compute-sanitizer, which comes with the CUDA toolkit, and found no" \
			"$(COMPUTE_SANITIZER): name it with make sanitize COMPUTE_SANITIZER=..." >&2; exit 1; }; \
	for tool in memcheck racecheck initcheck synccheck; do \
		echo "sanitize: $$tool"; \
		"$(COMPUTE_SANITIZER)" --tool $$tool --error-exitcode 1 $(PY) scripts/sanitizer_cases.py \
			$$([ $$tool = initcheck ] && echo --without-hopper) || { \
			echo "make sanitize: $$tool failed" >&2; exit 1; }; \
	done

lint: set-up-lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) scripts/check_format.py
	$(PY) scripts/check_house_rules.py

format: set-up-lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) scripts/check_format.py --fix

build: set-up-build

.PHONY: set-up-demo set-up-test set-up-gpu-test set-up-lint set-up-build
set-up-demo set-up-test set-up-gpu-test set-up-lint set-up-build: set-up-%: $(NEW_ENVIRONMENT)
	@$(PY) scripts/set_up.py $*

.venv/bin/python:
	@for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
			echo "set up: making .venv with $$python"; \
			$$python -m venv .venv && exit 0; \
			rm -rf .venv; exit 1; \
		fi; \
	done; \
	echo "no Python >= 3.10 found: name one with make PYTHON=..." >&2; exit 1

clean:
	rm -rf build dist *.egg-info int8_ops/*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
