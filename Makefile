# make test    the whole test suite, linters, types and import contract
# make demo    collect, fit, compare, replay, report, and a policy that acts in simulation
#              DATA=<folder or Hub id>: fit, compare and report on your own data, without torch and simulator
# Both make a virtual environment in .venv first; PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# One BLAS thread a process: the suite and the demo use processes instead.
export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1

.PHONY: test lint demo docs results clean

test: $(VENV)/.dev lint
	$(BIN)/pytest -q -n 2 --dist loadfile --durations=10

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/mypy
	$(BIN)/lint-imports

ifdef DATA
demo: $(VENV)/.demo
	$(BIN)/actok demo --data "$(DATA)" --out "$(OUT)"
else
demo: $(VENV)/.simulation
	$(BIN)/actok demo --out "$(OUT)"
endif

# Pages that are generated: the CLI reference and the README's output.
docs: $(VENV)/.dev
	$(BIN)/python tools/make_docs.py

results: $(VENV)/.dev
	$(BIN)/python tools/make_results.py $(if $(DATA_ROOT),--data-root "$(DATA_ROOT)") $(if $(TEACHER),--teacher "$(TEACHER)") $(if $(ONLY),--only $(ONLY))

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "actok needs Python 3.11 or newer; choose one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[demo]'
	touch $@

$(VENV)/.simulation: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[demo,metaworld,torch]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
