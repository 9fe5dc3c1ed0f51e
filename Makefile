# Each target does its own set-up: a virtual environment in .venv, made again only when pyproject.toml or
# constraints.txt changed. `make demo` and `make test` are the two to know.

PYTHON ?= python3
SECONDS ?= 60
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

TINY := models/tiny/transformer/diffusion_pytorch_model.safetensors
DERIVED := build/tiny
CHECKPOINTS := $(foreach kind,comfy-fp8-scaled modelopt-nvfp4,\
	$(foreach names,original diffusers,$(DERIVED)/$(kind)-$(names).safetensors))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test coverage test-gpu test-long soak check bench fuzz clips checkpoints clean

help:  ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## Serve the bundled tiny model in NVFP4, generate one clip over HTTP, save demo.mp4
	$(BIN)/python examples/demo.py

serve: $(READY)  ## Keep that server up, on port 8000
	$(BIN)/python examples/demo.py --serve

# A GPU is hidden from these: the tests of what a machine without one does would find one.
test: export CUDA_VISIBLE_DEVICES =
test: check  ## The checks, then every test that needs no GPU
	$(BIN)/python -m pytest -m "not long" --numprocesses 2 --dist loadfile

test-gpu: $(READY)  ## The tests that need a GPU, one after another
	$(BIN)/python -m pytest tests/gpu

coverage: $(READY)  ## The same tests, and which lines none of them runs; half as long again
	$(BIN)/python -m pytest -m "not long" --numprocesses 2 --dist loadfile --cov --cov-report=term

test-long: $(READY)  ## The tests that `make test` leaves out: kills and hangs of the server, the whole fault matrix
	$(BIN)/python -m pytest -m long --numprocesses 2 --dist loadfile

soak: $(READY)  ## The server's long tests: 50 cancels, 100 rounds of kill -9, odd requests, a crowd, 4,000 jobs
	WAN_SOAK=1 $(BIN)/python -m pytest tests/serve/endpoints/test_cancel.py tests/serve/test_kills.py \
		tests/serve/test_openapi.py tests/serve/test_load.py tests/serve/test_soak.py

check: $(READY)  ## Format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy $(wildcard examples/*.py benchmarks/*.py)
	$(BIN)/lint-imports

bench: $(READY)  ## Time a patched model on this machine
	$(BIN)/wan-runtime bench

fuzz: $(READY)  ## Fuzz the reading of headers for SECONDS (60)
	$(BIN)/python -m pip install --quiet atheris==3.0.0
	$(BIN)/python -m tests.fuzz.parser build/fuzz -max_total_time=$(SECONDS)

clips: $(READY) checkpoints  ## Score clips of the tiny model in every format (on a GPU where there is one)
	$(BIN)/python models/tiny/clips.py

checkpoints: $(CHECKPOINTS)  ## Derive the tiny model's FP8 and NVFP4 files with our own convert

# The pattern's stem is KIND-NAMES: what comes after the last dash is the names.
$(DERIVED)/%-original.safetensors: $(TINY) | $(READY)
	@mkdir -p $(@D)
	$(BIN)/wan-runtime convert $< $@ --to $* --names original

$(DERIVED)/%-diffusers.safetensors: $(TINY) | $(READY)
	@mkdir -p $(@D)
	$(BIN)/wan-runtime convert $< $@ --to $* --names diffusers

# PIP_CONSTRAINT, not -c: it also holds the build backend that pip installs in isolation. diffsynth comes alone: tests
# patch its Wan model, and what it requires for other things (torchvision, pandas, modelscope) would be dead weight.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "wan-runtime needs Python 3.11 or newer and '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
		     "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up $(VENV) (about 2 GB; 2 to 5 minutes)"
	$(PYTHON) -m venv --clear $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install --quiet --editable '.[diffusers,serve,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt diffsynth
	@touch $@

clean:  ## Remove everything that make made
	rm -rf $(VENV) build dist demo.mp4 .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf *.egg-info
