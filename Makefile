# Each target sets up all it needs in .venv: git, make and Python 3.10 or newer are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
SOURCES := $(shell git ls-files t2t_timm '*.cfg' '*.toml' '*.pth' '*.start' '_*.py' MANIFEST.in 2>/dev/null)

.PHONY: demo test timm-suite lint clean

demo: $(VENV)/package
	cd $(VENV) && $(BIN)/python -m t2t_timm.demo

test: $(VENV)/tests
	cd tests && $(BIN)/pytest -c ../setup.cfg --rootdir .. . $(ARGS)

timm-suite: $(VENV)/tests
	cd $(VENV) && $(BIN)/python $(CURDIR)/tools/timm_suite.py $(ARGS)

lint: $(VENV)/tests
	$(BIN)/ruff check .

# the package is installed as a user installs it; the targets run outside the source tree, so that this is what they test
$(VENV)/package: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet .
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps .
	touch $@

$(VENV)/tests: $(VENV)/package
	$(BIN)/python -m pip install --quiet ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
