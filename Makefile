# make tune   tune a model's kernels (without a GPU: predicted for GPU), in an environment it builds first
# make report   show what was tuned as a page in the browser
# make test   lint, type-check and test, likewise
# make test-slow   the tests that take seconds each
# make test-versions   test the core with the oldest and the newest versions of the packages, in environments of their own
# make test-dist   build the sdist and the wheel in dist, and test the wheel in an environment of its own
# make lint   lint and type-check; make lint-versions type-checks for later Pythons; make clean
# make test-internals   test the core without each private name of PyTorch
# make prebuilt GPU=h200 STORES="a.sqlite b.sqlite"   merge measured winners into the package's store of a GPU
# make binaries GPU=h100-sxm MODELS="llama-8b" RANKS="16"   build the wheel of a GPU's binaries in dist
# make docs   build the site in docs/_build; a warning is an error
#
# Standard output holds what doratune prints and nothing else: make tune TUNE_ARGS=--json gives one JSON object.
MODEL ?= llama-8b
RANK ?= 384
GPU ?= h200
PYTHON ?= python3
VENV ?= .venv
TUNE_ARGS ?=
REPORT_ARGS ?=
STORES ?=
MODELS ?= $(MODEL)
RANKS ?= $(RANK)
BUILD_ARGS ?=
TEST_ARGS ?= -n auto --dist worksteal

BIN = $(VENV)/bin
VERSIONS = $(VENV)/versions
CORE_TESTS = tests/test_versions.py tests/test_import.py tests/test_cli.py tests/internals tests/runtime tests/nn \
	tests/integrations tests/adapters tests/cache tests/codegen/test_render.py tests/tuner/test_search.py tests/tuner/test_tune_model.py \
	tests/report
TYPED = -m doratune -m doratune.errors -p doratune.internals -m doratune.cli -m doratune.cache_commands \
	-m doratune.printable -m doratune.doctor -m doratune.temporaries -m doratune.text_file -m doratune.__main__ -p doratune.terminal \
	-p doratune.codegen -p doratune.cache -p doratune.tuner -p doratune.runtime -p doratune.nn -p doratune.integrations \
	-p doratune.adapters -p doratune.benchmarks -p doratune.report
# The newest Python that starts here: a command of that name may be a version manager's stub.
NEWEST_PYTHON ?= $(firstword $(foreach python,python3.14 python3.13 python3.12,$(shell $(python) -c 'print("$(python)")' 2>/dev/null)) $(PYTHON))

.PHONY: prebuilt binaries tune report test test-slow test-versions test-internals test-dist lint lint-versions docs clean

tune: $(VENV)/installed
	@$(BIN)/doratune tune --model $(MODEL) --rank $(RANK) \
		$$($(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else '--gpu $(GPU)')") $(TUNE_ARGS)

report: $(VENV)/installed
	@$(BIN)/doratune report --open $(REPORT_ARGS)

test: $(VENV)/installed-test lint
	$(BIN)/python -m pytest $(TEST_ARGS) -m "not slow"

# Tests that wait, compile whole models or start processes.
test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest $(TEST_ARGS) -m slow

# The newest column has the newest Python. The last one adds another bitsandbytes to it.
test-versions: lint-versions $(VERSIONS)/oldest/installed $(VERSIONS)/newest/installed $(VERSIONS)/bitsandbytes-0.49/installed
	$(VERSIONS)/oldest/bin/python -m pytest $(TEST_ARGS) --versions oldest $(CORE_TESTS)
	$(VERSIONS)/newest/bin/python -m pytest $(TEST_ARGS) --versions newest $(CORE_TESTS)
	PYTHONPATH=$(abspath $(VERSIONS)/bitsandbytes-0.49) $(VERSIONS)/newest/bin/python -m pytest $(TEST_ARGS) \
		--versions bitsandbytes-0.49 tests/test_versions.py \
		tests/integrations/peft/test_quantised.py tests/integrations/peft/test_stored.py \
		tests/integrations/peft/test_stored_calls.py tests/integrations/peft/test_stored_groups.py

# What an earlier build left would be built in again. The wheel's environment borrows the dependencies of $(VENV).
test-dist: $(VENV)/installed-test
	rm -rf dist build doratune.egg-info $(VENV)/dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m venv $(VENV)/dist
	$(VENV)/dist/bin/pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(VENV)/dist/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(BIN)/python -m pytest --installed $(VENV)/dist/bin/python tests/test_dist.py

# The core suite once for each private name of PyTorch that doratune uses, as if PyTorch did not have it.
test-internals: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --internals tests/internals

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .mypy && ln -sfn "$(CURDIR)" .mypy/doratune
	MYPYPATH=.mypy $(BIN)/mypy $(TYPED)

# What the type checker knows of each later Python, whichever are installed here.
lint-versions: $(VENV)/installed-test
	@mkdir -p .mypy && ln -sfn "$(CURDIR)" .mypy/doratune
	set -e; for version in 3.12 3.13 3.14; do MYPYPATH=.mypy $(BIN)/mypy --python-version $$version $(TYPED); done

docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -E -W -n --keep-going -q docs docs/_build

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "building the environment in $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[report]' >&2
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt
	@echo "building the environment in $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]' >&2
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml constraints.txt
	@echo "building the environment in $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs,report]' >&2
	@touch $@ $(VENV)/installed

$(VERSIONS)/bitsandbytes-0.49/installed: tests/versions/bitsandbytes-0.49.txt $(VERSIONS)/newest/installed
	@echo "adding $(<F) in $(@D)" >&2
	@rm -rf $(@D)
	@$(VERSIONS)/newest/bin/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) --requirement $< >&2
	@touch $@

$(VERSIONS)/newest/installed: PYTHON := $(NEWEST_PYTHON)

# PIP_CONSTRAINT takes the place of constraints that pip may be configured with here: a column says all of its versions.
$(VERSIONS)/%/installed: constraints-%.txt pyproject.toml
	@echo "building the environment in $(@D)" >&2
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@PIP_CONSTRAINT=$(abspath $<) $(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $< \
		--editable . 'pytest>=8.2' 'pytest-xdist>=3.6' 'pytest-timeout>=2.3' 'hypothesis>=6.100' >&2
	@touch $@

# The package's entries are candidates too, so what is slower than they are stays out; binaries have packages of their own.
prebuilt: $(VENV)/installed
	test -n "$(STORES)"
	rm -rf $(VENV)/prebuilt.sqlite*
	$(BIN)/doratune cache merge $(wildcard cache/prebuilt/$(GPU).sqlite) $(STORES) --store $(VENV)/prebuilt.sqlite
	$(BIN)/doratune cache export --store $(VENV)/prebuilt.sqlite --gpu $(GPU) --measured --no-binaries --replace \
		-o cache/prebuilt/$(GPU).sqlite
	$(BIN)/doratune cache verify --store cache/prebuilt/$(GPU).sqlite

binaries: $(VENV)/installed-test
	rm -rf $(VENV)/binaries
	mkdir -p $(VENV)/binaries
	set -e; for model in $(MODELS); do $(BIN)/doratune cache build --model $$model \
		$(foreach rank,$(RANKS),--rank $(rank)) --gpu $(GPU) $(BUILD_ARGS) -o $(VENV)/binaries/$$model.sqlite; done
	$(BIN)/doratune cache package $(VENV)/binaries/*.sqlite -o dist

clean:
	rm -rf $(VENV) dist build doratune.egg-info .mypy .mypy_cache .ruff_cache .pytest_cache .hypothesis docs/_build
