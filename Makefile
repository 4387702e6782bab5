# make tune   tune a model's kernels (without a GPU: predicted for GPU), in an environment it builds first
# make test   lint, type-check and test, likewise
#
# Standard output holds what doratune prints and nothing else: make tune TUNE_ARGS=--json gives one JSON object.
MODEL ?= llama-8b
RANK ?= 384
GPU ?= h200
PYTHON ?= python3
VENV ?= .venv
TUNE_ARGS ?=
TEST_ARGS ?= -n auto --dist worksteal

BIN = $(VENV)/bin

.PHONY: tune test lint clean

tune: $(VENV)/installed
	@$(BIN)/doratune tune --model $(MODEL) --rank $(RANK) \
		$$($(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else '--gpu $(GPU)')") $(TUNE_ARGS)

test: $(VENV)/installed-test lint
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .mypy && ln -sfn "$(CURDIR)" .mypy/doratune
	MYPYPATH=.mypy $(BIN)/mypy -m doratune -m doratune.errors -m doratune.cli -m doratune.nn -p doratune.codegen -p doratune.cache -p doratune.tuner -p doratune.runtime -p doratune.benchmarks

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "building the environment in $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable . >&2
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt
	@echo "building the environment in $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]' >&2
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) .mypy .mypy_cache .ruff_cache .pytest_cache .hypothesis
