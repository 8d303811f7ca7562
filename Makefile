# Each target sets up all it needs in .venv: git, make and Python 3.10 or newer are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
OLDEST := .venv-oldest
OLDEST_TESTS := layers models weights hub/test_convert.py hub/test_push.py commands/test_export.py test_autoload.py test_users.py
SOURCES := $(shell git ls-files t2t_timm '*.cfg' '*.toml' '*.pth' '*.start' '_*.py' MANIFEST.in 2>/dev/null)

.PHONY: demo test fuzz test-oldest timm-suite lint clean

demo: $(VENV)/package
	cd $(VENV) && $(BIN)/python -m t2t_timm.commands.demo

# two files at a time, as their fixtures are shared; ARGS='-n 0' runs one, all fast tests first
test: $(VENV)/tests
	cd tests && $(BIN)/pytest -c ../setup.cfg --rootdir .. -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# long: 2,000 mutated checkpoints, 2,000 label lists and tars; ARGS='--seed 2000' takes others, --help says more
fuzz: $(VENV)/tests
	cd tests && $(BIN)/python -m fuzz.run $(ARGS)

# without the optional extras: what needs one is skipped
test-oldest: $(OLDEST)/tests
	cd tests && $(CURDIR)/$(OLDEST)/bin/python -m pytest -c ../setup.cfg --rootdir .. -m 'not slow' $(OLDEST_TESTS) $(ARGS)

timm-suite: $(VENV)/tests
	cd $(VENV) && $(BIN)/python $(CURDIR)/tools/timm_suite.py $(ARGS)

lint: $(VENV)/tests
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/private_names.py
	$(BIN)/mypy

# the package is installed as a user installs it; the targets run outside the source tree, so that this is what they test
$(VENV)/package: $(SOURCES)
	@echo "Installing PyTorch, timm and this package into $(VENV): on Linux some minutes and 5.5 GB the first time."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	rm -rf build  # setuptools would pack modules again that are no longer in the tree
	$(BIN)/python -m pip install .
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps .
	touch $@

$(VENV)/tests: $(VENV)/package
	$(BIN)/python -m pip install ".[test]"
	touch $@

$(OLDEST)/tests: $(SOURCES) tools/oldest.py
	test -x $(OLDEST)/bin/python || $$($(PYTHON) tools/oldest.py --python) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $$($(PYTHON) tools/oldest.py) pytest pytest-timeout hypothesis
	rm -rf build
	$(OLDEST)/bin/python -m pip install --quiet --force-reinstall --no-deps .
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
