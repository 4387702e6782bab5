# make tune   tune a model's kernels (without a GPU: predicted for GPU), in an environment it builds first
# make test   lint, type-check and test, likewise
# make test-versions   test with the oldest and the newest versions of the libraries, in environments of their own
# make test-internals  run the core suite without each private name of PyTorch
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
VERSIONS = $(VENV)/versions
VERSION_TESTS = tests/test_versions.py tests/integrations/peft/test_accelerate.py tests/integrations/peft/test_quantised.py \
	tests/integrations/peft/test_glance.py tests/integrations/peft/test_lifecycle.py tests/nn/test_module.py tests/test_cli.py \
	tests/cache tests/codegen/test_render.py tests/tuner/test_search.py tests/tuner/test_tune_model.py

.PHONY: tune test test-versions test-internals lint clean

tune: $(VENV)/installed
	@$(BIN)/doratune tune --model $(MODEL) --rank $(RANK) \
		$$($(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else '--gpu $(GPU)')") $(TUNE_ARGS)

test: $(VENV)/installed-test lint
	$(BIN)/python -m pytest $(TEST_ARGS)

# One column of tests/versions after the other; the last one adds another bitsandbytes to the newest.
test-versions: $(VERSIONS)/oldest/installed $(VERSIONS)/newest/installed $(VERSIONS)/bitsandbytes-0.49/installed
	$(VERSIONS)/oldest/bin/python -m pytest $(TEST_ARGS) --versions oldest $(VERSION_TESTS)
	$(VERSIONS)/newest/bin/python -m pytest $(TEST_ARGS) --versions newest $(VERSION_TESTS)
	PYTHONPATH=$(abspath $(VERSIONS)/bitsandbytes-0.49) $(VERSIONS)/newest/bin/python -m pytest $(TEST_ARGS) \
		--versions bitsandbytes-0.49 tests/test_versions.py tests/integrations/peft/test_quantised.py

# The core suite once for each private name of PyTorch that doratune uses, as if PyTorch did not have it.
test-internals: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --internals tests/internals

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .mypy && ln -sfn "$(CURDIR)" .mypy/doratune
	MYPYPATH=.mypy $(BIN)/mypy -m doratune -m doratune.errors -p doratune.internals -m doratune.cli -m doratune.console -m doratune.doctor -p doratune.codegen -p doratune.cache -p doratune.tuner -p doratune.runtime -p doratune.nn -p doratune.integrations -p doratune.benchmarks

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

$(VERSIONS)/bitsandbytes-0.49/installed: tests/versions/bitsandbytes-0.49.txt $(VERSIONS)/newest/installed
	@echo "adding $(<F) in $(@D)" >&2
	@mkdir -p $(VERSIONS) && rm -rf $(@D)
	@$(VERSIONS)/newest/bin/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) --requirement $< >&2
	@touch $@

$(VERSIONS)/%/installed: tests/versions/%.txt pyproject.toml constraints.txt
	@echo "building the environment in $(@D)" >&2
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $< \
		--editable . 'pytest>=8.2' 'pytest-xdist>=3.6' 'pytest-timeout>=2.3' 'hypothesis>=6.100' >&2
	@touch $@

clean:
	rm -rf $(VENV) .mypy .mypy_cache .ruff_cache .pytest_cache .hypothesis
