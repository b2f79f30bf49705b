# Every target sets up what it needs; none hides a failure.
PYTHON ?= python3
VENV   ?= .venv
SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN    := $(VENV)/$(SCRIPTS)
# The oldest Python that is supported, or PYTHON where it is not installed; a shim of pyenv may be there without one.
PYTHON_OLDEST ?= $(firstword $(shell python3.10 -c "import sys; print(sys.executable)" 2>/dev/null) \
	$(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) $(PYTHON))
# One thread per process: with the spin-waiting of OpenMP, two busy processes on two cores starve each other.
export OMP_NUM_THREADS ?= 1
export WANDB_MODE ?= offline
# Tests run in this many processes.
JOBS ?= 2
PYTEST := -m pytest -n $(JOBS) --dist worksteal

.PHONY: help install demo study test test-oldest test-newest check lint types docs package wheel-test format lock bench clean

help:
	@echo "make demo         train the glyphs without and with a memory: a table and a picture (about 2 minutes)"
	@echo "make study        rerun the studies: glyphs, CJK (needs fonts), and photographs if in data/ (7 hours)"
	@echo "make test         run the test suite on the locked versions"
	@echo "make test-oldest  run it on the lowest versions that are allowed    make test-newest  on the newest"
	@echo "make check        format, lint, types, documentation, wheel and tests"
	@echo "make wheel-test   install the wheel alone, and run the code and commands of the README with it"
	@echo "make docs         build the documentation site in build/docs"
	@echo "make format       format the code"
	@echo "make lock         renew the locked versions in requirements/"
	@echo "make bench        run the benchmarks"
	@echo "make clean        remove what the other targets made"

# $(call environment,FOLDER,PYTHON,WHAT TO INSTALL): make an environment or bring it up to date, and mark it as complete.
define environment
	$(2) -m venv $(1)
	$(1)/$(SCRIPTS)/python -m pip install --quiet --upgrade pip
	$(1)/$(SCRIPTS)/python -m pip install --quiet $(3)
	@touch $(1)/.installed
endef

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements/locked.txt
	$(call environment,$(VENV),$(PYTHON),--constraint requirements/locked.txt --editable ".[dev]")

.venv-oldest/.installed: pyproject.toml requirements/oldest.txt
	$(call environment,.venv-oldest,$(PYTHON_OLDEST),--constraint requirements/oldest.txt --editable ".[dev]")

.venv-release/.installed: pyproject.toml requirements/locked.txt
	$(call environment,.venv-release,$(PYTHON),--constraint requirements/locked.txt "build" "twine")

# The environment for development if there is one, otherwise one without what only development needs.
DEMO := $(if $(wildcard $(VENV)/.installed),$(VENV),.venv-demo)

.venv-demo/.installed: pyproject.toml requirements/locked.txt
	$(call environment,.venv-demo,$(PYTHON),--constraint requirements/locked.txt --editable .)

demo: $(DEMO)/.installed
	$(DEMO)/$(SCRIPTS)/memdml demo

# The photographs are not part of the repository, and the characters of `cjk` need fonts: see experiments/README.md.
# A study without fonts fails by itself, and names them, so that the others run. It stands last.
PHOTO_FILES := data/birds.npz data/grocery.npz data/mobilenet_v1_025.pth
NO_PHOTOS := $(filter-out $(wildcard $(PHOTO_FILES)),$(PHOTO_FILES))
STUDY = $(sort $(wildcard experiments/study/$(1)_*.yaml))
STUDIES := $(call STUDY,glyphs) $(if $(NO_PHOTOS),,$(call STUDY,images)) $(call STUDY,cjk)

study: install
	@$(if $(NO_PHOTOS),echo "Left out: $(call STUDY,images). Missing: $(NO_PHOTOS). See experiments/README.md.",:)
	$(BIN)/memdml study $(STUDIES) --processes 2

test: install
	$(BIN)/python $(PYTEST)

# Beside the locked versions a warning of a dependency is shown, and does not fail a test: `-W default`.
test-oldest: .venv-oldest/.installed
	.venv-oldest/$(SCRIPTS)/python -m pip freeze --exclude-editable
	.venv-oldest/$(SCRIPTS)/python $(PYTEST) -W default

# Made anew each time: what is newest changes.
test-newest:
	rm -rf .venv-newest
	$(call environment,.venv-newest,$(PYTHON),--editable ".[dev]")
	.venv-newest/$(SCRIPTS)/python -m pip freeze --exclude-editable
	.venv-newest/$(SCRIPTS)/python $(PYTEST) -W default

check: lint types docs package test

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# NO_MKDOCS_2_WARNING: Material's notice about a later version of MkDocs, which is not a warning about these pages.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: .venv-release/.installed
	rm -rf dist
	.venv-release/$(SCRIPTS)/python -m build --outdir dist
	.venv-release/$(SCRIPTS)/python -m twine check --strict dist/*

wheel-test: package
	rm -rf .venv-wheel
	$(call environment,.venv-wheel,$(PYTHON),--constraint requirements/locked.txt dist/*.whl)
	.venv-wheel/$(SCRIPTS)/python tests/support/wheel.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One resolution for all platforms and for Python 3.10 to 3.13, and the lowest versions that pyproject.toml allows.
COMPILE = .venv-lock/$(SCRIPTS)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 \
	--no-python-downloads --no-config --annotation-style line --custom-compile-command "make lock" --quiet

lock:
	$(call environment,.venv-lock,$(PYTHON),--upgrade uv)
	$(COMPILE) --upgrade --constraint requirements/constraints.txt --output-file requirements/locked.txt
	$(COMPILE) --upgrade --resolution lowest-direct --output-file requirements/oldest.txt

bench: install
	$(BIN)/python experiments/benchmarks/pair_loss.py
	$(BIN)/python experiments/benchmarks/retrieval.py
	$(BIN)/python experiments/benchmarks/memory.py

clean:
	rm -rf $(VENV) .venv-demo .venv-oldest .venv-newest .venv-release .venv-wheel .venv-lock
	rm -rf runs lightning_logs wandb build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
