# The two commands of the README are `make demo` and `make test`. Both need only Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile
# gptqmodel asks for a newer torch than is tested here, and for packages its layers do not use: it
# and what its import needs are installed as they are. only tests use it.
GPTQMODEL := gptqmodel logbar device_smi threadpoolctl tokenicer defuser pillow requests urllib3 \
	certifi charset-normalizer

.PHONY: demo test check format clean

# Convert the built-in FP8 model to INT4, verify it by running both, and let both speak.
demo: $(VENV)/.run
	rm -rf build/demo-int4
	$(BIN)/requant convert demo build/demo-int4 --to int4 --verify
	@echo; echo "source:"; $(BIN)/requant run demo "The function returns" --max-tokens 48 --temperature 0.7 --seed 2
	@echo; echo "INT4:"; $(BIN)/requant run build/demo-int4 "The function returns" --max-tokens 48 --temperature 0.7 --seed 2

test: $(VENV)/.test
	$(PYTEST)

# Format, lint, types, tests: what CI runs.
check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) --durations=10

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "requant needs Python >= 3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(GPTQMODEL)
	@touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
