# Every target sets up .venv by itself, and again when the requirements have changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The oldest transformers that requirements.txt allows, in an environment of its own.
OLDEST := $(shell sed -n 's/^transformers>=\([0-9.]*\).*/\1/p' requirements.txt)
OLDEST_VENV := .venv-oldest
OLDEST_READY := $(OLDEST_VENV)/.ready
MODEL_TESTS := $(addprefix tests/test_,modeling_samf.py language_models.py slice_encoders.py generation.py backends.py extra_sources.py adapters.py \
	processing_samf.py remote_code.py published_reference.py push_to_hub.py train.py training_adapter.py training_order.py)

PYTEST := $(BIN)/python -m pytest -c tests/pytest.ini -q -rs
# Two processes, one a core; these files take about as long as those. (pytest-xdist's workers don't survive tests that fork.)
HALVES := test-a-to-p test-q-to-z

.PHONY: demo test $(HALVES) test-slow test-oldest lint clean

$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[test]'
	touch $@

$(OLDEST_READY): requirements.txt pyproject.toml
	test -x $(OLDEST_VENV)/bin/python || $(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet -r requirements.txt -e '.[test]' transformers==$(OLDEST)
	touch $@

demo: $(READY)
	$(BIN)/python demo.py $(if $(CT),--ct "$(CT)") $(DEMO_OPTIONS)

test: $(READY)
ifdef TEST_OPTIONS
	$(PYTEST) tests $(TEST_OPTIONS)
else
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs 2 $(HALVES)
endif

test-a-to-p: $(READY)
	$(PYTEST) tests/test_[a-p]*.py

test-q-to-z: $(READY)
	$(PYTEST) tests/test_[q-z]*.py

test-slow: $(READY)
	$(PYTEST) tests -m slow $(TEST_OPTIONS)

test-oldest: $(OLDEST_READY)
	$(OLDEST_VENV)/bin/python -m pytest -c tests/pytest.ini $(MODEL_TESTS) -q -rs $(TEST_OPTIONS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf runs/demo .pytest_cache .ruff_cache
