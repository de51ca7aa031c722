# anomalygpt-edge. `make demo` and `make test` need nothing done before; `make help` lists the rest.
# The environment is .venv, made by PYTHON (make PYTHON=python3.12 demo); ARGS go to the command that is run.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
NANO := models/nano/checkpoint
ARGS ?=

.PHONY: help demo test test-slow test-golden test-sanitize gpu-check lint bench bench-page venv venv-dev nano-train nano-bundle nano-sheet clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: venv  ## inspect the built-in production line; overlays and records go to out/demo
	$(BIN)/agpt run --source demo --out out/demo $(ARGS)

test: venv-dev  ## the tests that take minutes together
	$(BIN)/python -m pytest -m "not slow and not golden" $(ARGS)

test-slow: venv-dev  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(ARGS) || [ $$? = 5 ]  # 5: none is marked slow

# mypy cannot follow setup.py's package_dir: a folder of links shows it anomalygpt_edge as it is installed.
TYPED := .mypy_cache/tree/anomalygpt_edge

test-golden: venv-dev  ## the original's own results on full-size checkpoints (30 GB in AGPT_GOLDEN_CACHE)
	$(BIN)/python -m pytest -m golden tests/golden $(ARGS)

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZER_LIBRARIES = $$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) \
  $$(gcc -print-file-name=libstdc++.so)

test-sanitize: venv-dev  ## the C++ kernels' tests under address and undefined-behaviour sanitizers (GCC)
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build_ext --force \
	  --build-lib build/sanitize --build-temp build/sanitize-objects
	AGPT_SANITIZED=build/sanitize ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. \
	  LD_PRELOAD="$(SANITIZER_LIBRARIES)" $(BIN)/python -m pytest -p tests.kernels.sanitized \
	  tests/kernels/test_levels.py tests/kernels/test_operations.py $(ARGS)

gpu-check: venv-dev  ## engines, CUDA graphs and latencies on this machine's GPU; says what it skips
	$(BIN)/python -m tools.gpu_check $(ARGS)

lint: venv-dev  ## ruff and mypy
	$(BIN)/python -m ruff check .
	@mkdir -p $(TYPED) && for package in export kernels models runtime; do \
	  ln -sfn ../../../$$package $(TYPED)/$$package; done; ln -sfn ../../../runtime/api/__init__.py $(TYPED)/__init__.py
	MYPYPATH=.mypy_cache/tree $(BIN)/python -m mypy --explicit-package-bases -p anomalygpt_edge -p tools \
	  | sed 's|$(TYPED)/||'

# report.py comes last: it reads what the others write.
BENCHMARKS = $(filter-out benchmarks/report.py,$(sort $(wildcard benchmarks/*.py))) benchmarks/report.py

bench: venv-dev  ## every benchmark; tables on the screen, figures in benchmarks/results, then bench-page
	@for script in $(BENCHMARKS); do \
	  echo "== $$script" && $(BIN)/python $$script || exit; done

bench-page: venv-dev  ## docs/benchmarks.md from the figures in benchmarks/results
	$(BIN)/python benchmarks/report.py $(ARGS)

venv:  ## the environment of the runtime, in .venv
	@$(PYTHON) -m tools.venv

venv-dev:  ## the same with what export, training and tests need
	@$(PYTHON) -m tools.venv --extra dev

nano-train: venv-dev  ## train the bundled model (hours on two cores; resumes)
	$(BIN)/python -m anomalygpt_edge.models.nano.train $(ARGS)

nano-bundle: venv-dev  ## the trained checkpoint as the bundle that ships
	$(BIN)/agpt export --imagebind $(NANO)/imagebind.safetensors --vicuna $(NANO)/vicuna \
	  --pandagpt $(NANO)/pandagpt.safetensors --anomalygpt $(NANO)/anomalygpt.safetensors \
	  --text-features $(NANO)/text_features.npz --about $(NANO)/model.json --out models/nano/bundle $(ARGS)

nano-sheet: venv-dev  ## a contact sheet of generated parts, to look at
	$(BIN)/python -m anomalygpt_edge.models.nano.sheet $(ARGS)

clean:  ## caches, builds and the demo's results; not .venv
	rm -rf build dist out/demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
