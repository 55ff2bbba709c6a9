# make demo | test | bench | lint | clean. Each of them makes .venv and installs what it needs.
# make test-all adds the tests marked `long` and more examples of hypothesis's; test-processors runs
# the CPU kernels as they are compiled for processors with shorter vectors.
# make gpu uses $(PYTHON) as it is: a machine with a GPU has its own build of PyTorch.
PYTHON ?= python3
# One process per core; they share compiled kernels, and one that is done takes tests of the others.
PYTEST_ARGS ?= -n auto --dist worksteal
BENCH_ARGS ?=
GPU_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# One stamp per extra: an install is repeated only when what it depends on has changed.
STAMP := $(VENV)/.installed

.PHONY: demo test test-all test-processors test-triton bench gpu lint clean

demo: $(STAMP)-plot
	$(PY) examples/plot_ecg_delineation.py

test: $(STAMP)-test
	$(PY) -m pytest $(PYTEST_ARGS)

test-all: $(STAMP)-test
	HYPOTHESIS_PROFILE=thorough $(PY) -m pytest $(PYTEST_ARGS) -m "not triton"

# By LLVM's names: x86-64 with SSE2 alone, and with AVX2 but without AVX-512.
test-processors: $(STAMP)-test
	PY=$(PY) .ci/processors generic haswell

# Where Triton is installed: its kernels in its interpreter, and compiled for several GPUs. By group:
# what is compiled is shared between tests.
test-triton: $(STAMP)-test
	$(PY) -m pytest -n auto --dist loadgroup -m "triton and not long" \
		tests/flash_semicrf/streaming/triton

bench: $(STAMP)-test
	$(PY) -m benchmarks.run $(or $(BENCH_ARGS),--docs docs/benchmarks.md)

gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

# mypy reads the annotations of what is installed: PyTorch, NumPy, matplotlib.
lint: $(STAMP)-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

$(STAMP)-%: pyproject.toml constraints.txt flash_semicrf/_version.py | $(PY)
	$(PY) -m pip install -c constraints.txt -e ".[$*]"
	touch $@
