# Every target sets up .venv by itself on a machine that has python3 (3.11 or newer), make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export GPNNS_CACHE ?= $(CURDIR)/.cache

.PHONY: help course test lab app site render bench check clean
help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

course: $(VENV)/.ready  ## run every notebook on the mini world, results in runs/mini/
	$(BIN)/python notebooks/run.py

test: $(VENV)/.ready check  ## all tests, notebooks included
	$(BIN)/python -m pytest

lab: $(VENV)/.ready  ## open JupyterLab at the first notebook
	$(BIN)/jupyter lab notebooks/01_search_images.ipynb

app: $(VENV)/.ready  ## the explorer alone, as a web page on this machine
	cd notebooks && $(abspath $(BIN))/voila 01_search_images.ipynb

site: $(VENV)/.ready  ## the notebooks as web pages, in build/site/index.html
	$(BIN)/python notebooks/pages.py

render: $(VENV)/.ready  ## refresh the outputs that are committed with the notebooks
	$(BIN)/python notebooks/run.py --render

bench: $(VENV)/.ready  ## timings beside other libraries, in runs/bench.json
	$(BIN)/python tests/benchmarks/bench.py

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "gpnns needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is incomplete here; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]'
	@touch $@

clean:  ## remove environment, caches and results
	rm -rf $(VENV) .cache runs build *.egg-info
