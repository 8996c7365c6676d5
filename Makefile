# Every target sets up .venv by itself, and again when the requirements have changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
LAUNCHERS_READY := $(VENV)/.ready-launchers
# The oldest transformers that requirements.txt allows, in an environment of its own.
OLDEST := $(shell sed -n 's/^transformers>=\([0-9.]*\).*/\1/p' requirements.txt)
OLDEST_VENV := .venv-oldest
OLDEST_READY := $(OLDEST_VENV)/.ready
MODEL_TESTS := tests/model tests/training/test_train.py tests/training/test_training_adapter.py tests/training/test_training_order.py

PYTEST := $(BIN)/python -m pytest -q -rs
# Two processes, one per core; both groups take about as long. (pytest-xdist's workers don't survive tests that fork.)
HALVES := test-model test-others
MODEL_HALF := tests/model tests/evaluation tests/reporting tests/serving tests/web

# The public API, which mypy checks in strict mode.
TYPECHECK_PACKAGES ?= samf.model samf.data.schema samf.reporting samf.serving samf.web
# Whether `make lint` includes `make typecheck`; empty: no.
LINT_TYPECHECK ?= yes
# The repository's root is the package `samf`: a folder that holds a link of this name is where mypy finds it.
CHECKOUT := $(VENV)/checkout

.PHONY: demo test $(HALVES) test-slow test-launchers test-oldest lint typecheck docs clean

$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[test]'
	touch $@

$(LAUNCHERS_READY): $(READY)
	$(BIN)/python -m pip install --quiet -e '.[launchers]'
	touch $@

$(OLDEST_READY): requirements.txt pyproject.toml
	test -x $(OLDEST_VENV)/bin/python || $(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet -r requirements.txt -e '.[test]' transformers==$(OLDEST)
	touch $@

# The site is built from the sources without importing them, so it needs none of the requirements.
$(DOCS_READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

demo: $(READY)
	$(BIN)/python -m samf.experiments.demo $(if $(CT),--ct "$(CT)") $(DEMO_OPTIONS)

test: $(READY)
ifdef TEST_OPTIONS
	$(PYTEST) tests $(TEST_OPTIONS)
else
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs 2 $(HALVES)
endif

test-model: $(READY)
	$(PYTEST) $(MODEL_HALF)

test-others: $(READY)
	$(PYTEST) tests $(addprefix --ignore ,$(MODEL_HALF))

test-slow: $(READY)
	$(PYTEST) tests -m slow $(TEST_OPTIONS)

test-launchers: $(LAUNCHERS_READY)
	OMP_NUM_THREADS=1 $(PYTEST) tests/launchers -m slow $(TEST_OPTIONS)

test-oldest: $(OLDEST_READY)
	$(OLDEST_VENV)/bin/python -m pytest $(MODEL_TESTS) -q -rs $(TEST_OPTIONS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(LINT_TYPECHECK),$(MAKE) --no-print-directory typecheck)

typecheck: $(READY)
	mkdir -p $(CHECKOUT) && ln -sfn "$(CURDIR)" $(CHECKOUT)/samf
	MYPYPATH=$(CHECKOUT) $(BIN)/mypy $(addprefix -p ,$(TYPECHECK_PACKAGES))

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf runs/demo build .mypy_cache .pytest_cache .ruff_cache
