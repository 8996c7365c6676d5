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

.PHONY: demo test test-slow test-oldest lint clean

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
	$(BIN)/python -m pytest -c tests/pytest.ini tests -q -rs $(TEST_OPTIONS)

test-slow: $(READY)
	$(BIN)/python -m pytest -c tests/pytest.ini tests -q -rs -m slow $(TEST_OPTIONS)

test-oldest: $(OLDEST_READY)
	$(OLDEST_VENV)/bin/python -m pytest -c tests/pytest.ini $(MODEL_TESTS) -q -rs $(TEST_OPTIONS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf runs/demo .pytest_cache .ruff_cache
