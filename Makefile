# `make train` and `make test` need Python 3.10 to 3.13 and make; everything else is set up once, in $(VENV).
PYTHON ?= python3
VENV ?= .venv
# Files of tests at a time. Each of these processes has Ray clusters of its own.
WORKERS ?= 2
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A Python whose torch sees a GPU, with raytrain installed.
GPU_PYTHON ?= $(PYTHON)

.PHONY: train test gpu lint setup clean

train: setup
	$(BIN)/raytrain train --cfg_file configs/pointpillars_sim.yaml $(ARGS)

test: lint
	$(BIN)/pytest --numprocesses $(WORKERS)

# Every GPU test and benchmark, in eight minutes.
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --json gpu.json $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/installed

# torch first and by itself, so that nothing else can choose another.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): once, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[digits,pictures,dev]"
	@touch $@

# Leaves output/ alone: the runs are yours.
clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
