# Everything sets itself up: git, make and python3 >= 3.11 with venv are all that is needed.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
HOSTS_VENV ?= .venv-hosts
HOSTS := $(HOSTS_VENV)/.ready
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup run demo test test-hosts check format clean torture bench doctor reference images

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## install vitalsd into .venv (all other targets do so by themselves)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "vitalsd needs Python 3.11 or newer, and no python3 on PATH is; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . \
		|| { echo "pip could not install what vitalsd needs: is a package index reachable?" >&2; exit 1; }
	@touch $@
	@echo "ready: $(BIN)/vitalsd"

# What only tests, checks and benchmarks need.
$(READY): $(INSTALLED)
	@echo "installing the development tools"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' \
		|| { echo "pip could not install the development tools: is a package index reachable?" >&2; exit 1; }
	@touch $@

run: $(INSTALLED) ## serve the metrics of a process: make run ARGS="--pid 4242"
	@exec $(BIN)/vitalsd serve $(ARGS)

demo: $(INSTALLED) ## run an app with busy threads, and show what to curl
	@exec $(BIN)/python clients/examples/threaded_app.py $(ARGS)

# Three files at a time on two cores: most tests wait more than they compute. tests/conftest.py begins with the longest.
# Compiled first: the tests start hundreds of programs, and where Python writes no bytecode each would compile vitalsd.
test: $(READY) ## run the tests, three files at a time: make test ARGS="-k trailing", ARGS="-n 0 -s"
	@$(BIN)/python -m compileall -q service clients
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# PyInstaller, Qt and others, too heavy for every contributor.
$(HOSTS): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "vitalsd needs Python 3.11 or newer, and no python3 on PATH is; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "setting up $(HOSTS_VENV) with $(PYTHON)"
	@$(PYTHON) -m venv --clear $(HOSTS_VENV)
	@$(HOSTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hosts]' \
		|| { echo "pip could not install the tools of make test-hosts: is a package index reachable?" >&2; exit 1; }
	@touch $@

test-hosts: $(HOSTS) ## test real hosts: frozen applications, Qt, eventlet, strange homes; ARGS as for test
	@$(HOSTS_VENV)/bin/python -m pytest -n 2 --dist loadfile --timeout 600 --session-timeout 1200 $(ARGS) tests/hosts

doctor: $(INSTALLED) ## examine vitalsd on this machine: make doctor ARGS="--soak 60"
	@$(BIN)/vitalsd doctor $(ARGS)

torture: $(READY) ## run the long tests: kills, faults and loads by the thousand
	@VITALSD_KILLS=400 $(BIN)/python -m pytest --timeout 3600 tests/recording/test_black_box.py -k killed
	@VITALSD_WINDOWS=1000000 $(BIN)/python -m pytest --timeout 3600 -s tests/sources/test_invariants.py
	@VITALSD_EXAMPLES=2000 $(BIN)/python -m pytest --timeout 3600 -m "hypothesis and not torture"
	@$(BIN)/python -m pytest --timeout 3600 -m torture $(ARGS)

bench: $(READY) ## measure, and write docs/performance.md: make bench ARGS=--quick
	@$(BIN)/python benchmarks/suite.py $(ARGS)

reference: $(READY) ## write docs/api.md and the JSON Schema, as the program says
	@$(BIN)/python docs/make.py reference

images: $(READY) ## take the pictures in docs/images, in a real browser
	@$(BIN)/python docs/make.py images

check: $(READY) ## format, lint, imports between packages, and types, for Linux and macOS
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy --platform linux & linux=$$!; $(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin; darwin=$$?; \
		wait $$linux && exit $$darwin

format: $(READY) ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what the other targets made
	rm -rf $(VENV) $(HOSTS_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
