# Every target sets up .venv by itself, and again when the requirements have changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint clean

$(READY): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[test]'
	touch $@

demo: $(READY)
	$(BIN)/python demo.py $(if $(CT),--ct "$(CT)") $(DEMO_OPTIONS)

test: $(READY)
	$(BIN)/python -m pytest -c tests/pytest.ini tests -q -rs $(TEST_OPTIONS)

test-slow: $(READY)
	$(BIN)/python -m pytest -c tests/pytest.ini tests -q -rs -m slow $(TEST_OPTIONS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf runs .pytest_cache .ruff_cache
