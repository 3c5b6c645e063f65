# Every target sets up .venv by itself on a machine that has python3 (3.11 or newer), make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export GPNNS_CACHE ?= $(CURDIR)/.cache

.PHONY: help course test test-all lab app site render world claims bench check clean
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

course: $(VENV)/.ready  ## run every notebook on the mini world, results in runs/mini/
	$(BIN)/python -m gpnns.tools.run

# Two workers, one thread each. The default needs no browser, and trains no more than a few steps.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/.ready check  ## what breaks when something breaks: every notebook, every promise; about twelve minutes
	$(TESTS) -m "not slow"

test-all: $(VENV)/.ready check  ## the same with whole trainings, the browser, the wheel, fifty kills; about 40 minutes
	$(TESTS)

lab: $(VENV)/.ready  ## open JupyterLab at the first notebook
	$(BIN)/jupyter lab notebooks/01_search_images.ipynb

app: $(VENV)/.ready  ## the explorer alone, as a web page on this machine
	cd notebooks && $(abspath $(BIN))/voila 01_search_images.ipynb --Voila.config_file_paths=gpnns/tools

site: $(VENV)/.ready  ## the notebooks as web pages, in build/site/index.html
	$(BIN)/python -m gpnns.tools.pages

render: $(VENV)/.ready  ## refresh the outputs that are committed with the notebooks
	$(BIN)/python -m gpnns.tools.run --render

world: $(VENV)/.ready  ## make the weights and scores that are shipped anew, from code alone; goes on after a break
	$(BIN)/python -m gpnns.tools.make_world

claims: $(VENV)/.ready  ## the table of the papers' claims, data/claims.csv, from the shipped scores; what is missing is trained
	$(BIN)/python -m gpnns.claims.claims_table

bench: $(VENV)/.ready  ## timings beside other libraries, in runs/bench.json
	$(BIN)/python tests/benchmarks/bench.py

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# .ready is made last: after a failure the next make goes on with the installation.
$(VENV)/.ready: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. Install Python 3.11 or newer with its venv module (Debian and Ubuntu: apt install python3-venv; macOS: brew install python), or name one that is there: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) notebooks/gpnns/tools/install.py
	@touch $@

clean:  ## remove environment, caches and results
	rm -rf $(VENV) .cache runs build *.egg-info
