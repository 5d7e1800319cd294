# The two that matter: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
PLUGINS := $(wildcard plugins/*/pyproject.toml)
SOURCES := bpf plugins tests benchmarks

.PHONY: help install demo test test-all gpu chaos cluster-chaos fuzz lint format bench clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: .venv/.installed  ## make .venv with bpf, its plugins and the development tools

.venv/.installed: pyproject.toml $(PLUGINS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(foreach plugin,$(PLUGINS),--editable $(dir $(plugin)))
	@touch $@

demo: install  ## run a real grid over five learning rules on the embedded data set, and show the result also as a page
	rm -rf runs/demo
	$(BIN)/bpf tune runs/demo --spec examples/demo.yaml
	$(BIN)/bpf report runs/demo

test: install  ## run the tests, but for those that take long
	$(BIN)/python -m pytest -n auto -m "not slow"

test-all: install  ## run every test: also kills at every place, browsers, servers that restart, real images
	$(BIN)/python -m pytest -n auto

gpu: install  ## on a machine with a CUDA device: the tests that need one, and bpf beside its floor (8 minutes, build/gpu.json)
	$(BIN)/python -m pytest -rs -m gpu
	mkdir -p build
	$(BIN)/python benchmarks/gpu.py --json build/gpu.json

chaos: install  ## kill a grid's processes 200 times (BPF_CHAOS_KILLS, BPF_CHAOS_SEED) and check what comes out
	BPF_CHAOS_KILLS=$${BPF_CHAOS_KILLS:-200} $(BIN)/python -m pytest -s tests/test_chaos.py

cluster-chaos: install  ## 200 events on Ray clusters: nodes come, go and die, processes are killed (BPF_CLUSTER_EVENTS, BPF_CHAOS_SEED)
	BPF_CLUSTER_EVENTS=$${BPF_CLUSTER_EVENTS:-200} $(BIN)/python -m pytest -s tests/test_cluster_events.py

fuzz: install  ## give bpf 3,000 files, options and names that lie (BPF_FUZZ_CASES, BPF_FUZZ_SEED) and check what it says and does
	BPF_FUZZ_CASES=$${BPF_FUZZ_CASES:-3000} $(BIN)/python -m pytest -n auto tests/test_fuzz.py

lint: install  ## check style and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: install  ## put the code into shape
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: install  ## measure the training step, memory, the study's overhead, what workers bring, what trackers cost and whether intervals hold
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/study.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/trackers.py
	$(BIN)/python benchmarks/intervals.py

clean:  ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
