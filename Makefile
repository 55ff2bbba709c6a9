# make demo | test | bench | lint | clean. Each of them makes .venv and installs what it needs.
# make gpu uses $(PYTHON) as it is: a machine with a GPU has its own build of PyTorch.
PYTHON ?= python3
# One process per core, each with whole files: tests of one file share compiled kernels.
PYTEST_ARGS ?= -n auto --dist loadfile
BENCH_ARGS ?=
GPU_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# One stamp per extra: an install is repeated only when what it depends on has changed.
STAMP := $(VENV)/.installed

.PHONY: demo test bench gpu lint clean

demo: $(STAMP)-plot
	$(PY) examples/plot_ecg_delineation.py

test: $(STAMP)-test
	$(PY) -m pytest $(PYTEST_ARGS)

bench: $(STAMP)-test
	$(PY) -m benchmarks.run $(or $(BENCH_ARGS),--docs docs/benchmarks.md)

gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

lint: $(VENV)/.ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

$(STAMP)-%: pyproject.toml constraints.txt flash_semicrf/_version.py | $(PY)
	$(PY) -m pip install -c constraints.txt -e ".[$*]"
	touch $@

# Linting needs no torch.
$(VENV)/.ruff: constraints.txt | $(PY)
	$(PY) -m pip install -c constraints.txt "ruff>=0.14"
	touch $@
