PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test style quality bench clean

demo: $(STAMP)  ## the main job: plain generate, an AR assistant and our drafter, side by side
	$(BIN)/hf-specdiff demo

test: $(STAMP)  ## all tests, two at a time
	$(BIN)/python -m pytest -n 2 --dist worksteal

style: $(STAMP)  ## format and fix; the map of modules in docs/layout.md
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m benchmarks.layout

quality: $(STAMP)  ## format, lint and types, nothing changed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## the figures of README.md, docs/ and the model cards; goes on where it was interrupted
	$(BIN)/hf-specdiff bench --output build/bench
	cp build/bench/results.json benchmarks/results/standard.json
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.cards model_cards
	rm -r build/bench

clean:
	rm -rf $(VENV)

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps dflash speculators  # they ask for an older transformers
	touch $(STAMP)
