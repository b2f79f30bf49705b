# Every target sets up what it needs; none hides a failure.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# One thread per process: with the spin-waiting of OpenMP, two busy processes on two cores starve each other.
export OMP_NUM_THREADS ?= 1
export WANDB_MODE ?= offline

.PHONY: help install demo study test check docs format bench clean

help:
	@echo "make demo    train the glyphs without and with a memory: a table and a picture (about 2 minutes)"
	@echo "make study   rerun the study: glyphs, and photographs if they are in data/ (110 minutes)"
	@echo "make test    run the test suite           make check   lint, types and tests"
	@echo "make docs    build the documentation site in build/docs"
	@echo "make bench   run the benchmarks           make format  format the code"
	@echo "make clean   remove what the other targets made"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: install
	$(BIN)/python experiments/compare.py experiments/glyphs_batch.yaml experiments/glyphs_memory.yaml \
		--picture runs/demo.png --output runs/demo.md

# The photographs are not part of the repository: see experiments/README.md.
FEATURES := $(and $(wildcard data/birds.npz),$(wildcard data/grocery.npz),data/birds_features.npz data/grocery_features.npz)

study: install $(FEATURES)
	$(BIN)/memdml study experiments/study/glyphs_*.yaml $(if $(FEATURES),experiments/study/features_*.yaml) --processes 2

data/%_features.npz: data/%.npz data/mobilenet_v2.pth | install
	OMP_NUM_THREADS= $(BIN)/python experiments/freeze.py $< $@ --weights data/mobilenet_v2.pth

test: install
	$(BIN)/python -m pytest

# NO_MKDOCS_2_WARNING: Material's notice about a later version of MkDocs, which is not a warning about these pages.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: install docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python experiments/benchmarks/pair_loss.py
	$(BIN)/python experiments/benchmarks/retrieval.py
	$(BIN)/python experiments/benchmarks/memory.py

clean:
	rm -rf $(VENV) runs lightning_logs wandb build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(FEATURES)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
