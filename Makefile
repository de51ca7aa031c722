# anomalygpt-edge. `make demo` and `make test` work in a new clone; `make help` lists all targets.
# PYTHON creates the environment .venv (make PYTHON=python3.12 demo); ARGS are passed to the command of the target.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
LITE := models/lite/checkpoint
NANO := models/nano/checkpoint
ARGS ?=

.PHONY: help demo test test-slow test-golden test-sanitize gpu-check lint bench bench-page venv venv-dev lite-train lite-bundle nano-train nano-bundle nano-sheet clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: venv  ## inspect the built-in production line; overlays and records go to out/demo
	$(BIN)/agpt run --source demo --out out/demo $(ARGS)

test: venv-dev  ## the test suite without the slow tests (minutes)
	$(BIN)/python -m pytest -m "not slow and not golden" $(ARGS)

test-slow: venv-dev  ## the slow tests (minutes each)
	$(BIN)/python -m pytest -m slow $(ARGS) || [ $$? = 5 ]  # 5: no test is marked slow

# mypy cannot follow setup.py's package_dir, so it gets a folder of links with the layout of the installed package.
TYPED := .mypy_cache/tree/anomalygpt_edge

test-golden: venv-dev  ## compare with results of the original code on full-size checkpoints (30 GB in AGPT_GOLDEN_CACHE)
	$(BIN)/python -m pytest -m golden tests/golden $(ARGS)

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
SANITIZER_LIBRARIES = $$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) \
  $$(gcc -print-file-name=libstdc++.so)

test-sanitize: venv-dev  ## run the C++ kernels' tests under address and undefined-behaviour sanitizers (GCC)
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build_ext --force \
	  --build-lib build/sanitize --build-temp build/sanitize-objects
	AGPT_SANITIZED=build/sanitize ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. \
	  LD_PRELOAD="$(SANITIZER_LIBRARIES)" $(BIN)/python -m pytest -p tests.kernels.sanitized \
	  tests/kernels/test_levels.py tests/kernels/test_operations.py $(ARGS)

gpu-check: venv-dev  ## check and time engines and CUDA graphs on this machine's GPU; prints what it skips
	$(BIN)/python -m tools.gpu_check $(ARGS)

lint: venv-dev  ## run ruff and mypy
	$(BIN)/python -m ruff check .
	@mkdir -p $(TYPED) && for package in export kernels models runtime; do \
	  ln -sfn ../../../$$package $(TYPED)/$$package; done; ln -sfn ../../../runtime/api/__init__.py $(TYPED)/__init__.py
	MYPYPATH=.mypy_cache/tree $(BIN)/python -m mypy --explicit-package-bases -p anomalygpt_edge -p tools \
	  | sed 's|$(TYPED)/||'

# report.py runs last because it reads the results of the others.
BENCHMARKS = $(filter-out benchmarks/report.py,$(sort $(wildcard benchmarks/*.py))) benchmarks/report.py

bench: venv-dev  ## run every benchmark, write benchmarks/results and docs/benchmarks.md
	@for script in $(BENCHMARKS); do \
	  echo "== $$script" && $(BIN)/python $$script || exit; done

bench-page: venv-dev  ## write docs/benchmarks.md from benchmarks/results
	$(BIN)/python benchmarks/report.py $(ARGS)

venv:  ## create or update .venv for the runtime
	@$(PYTHON) -m tools.venv

venv-dev:  ## the same, with the packages for export, training and tests
	@$(PYTHON) -m tools.venv --extra dev

lite-train: venv-dev  ## train the bundled model (hours on two cores; resumes)
	$(BIN)/python -m anomalygpt_edge.models.lite.train $(ARGS)

lite-bundle: venv-dev  ## export lite's checkpoint as the bundle that ships
	$(BIN)/agpt export --imagebind $(LITE)/vision.safetensors --vicuna $(LITE)/vicuna \
	  --pandagpt $(LITE)/pandagpt.safetensors --anomalygpt $(LITE)/anomalygpt.safetensors \
	  --text-features $(LITE)/text_features.npz --about $(LITE)/model.json --out models/lite/bundle $(ARGS)

nano-train: venv-dev  ## train nano, the small model for tests (an hour on two cores; resumes)
	$(BIN)/python -m anomalygpt_edge.models.nano.train $(ARGS)

nano-bundle: venv-dev  ## export nano's checkpoint as its bundle
	$(BIN)/agpt export --imagebind $(NANO)/imagebind.safetensors --vicuna $(NANO)/vicuna \
	  --pandagpt $(NANO)/pandagpt.safetensors --anomalygpt $(NANO)/anomalygpt.safetensors \
	  --text-features $(NANO)/text_features.npz --about $(NANO)/model.json --out models/nano/bundle $(ARGS)

nano-sheet: venv-dev  ## draw a contact sheet of generated parts
	$(BIN)/python -m anomalygpt_edge.models.nano.sheet $(ARGS)

clean:  ## delete caches, builds and results of the demo; keeps .venv
	rm -rf build dist out/demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
