#!/usr/bin/env bash
# Every bench on a CUDA machine, in one call: environment, llama.cpp compiled for CUDA, onnxruntime-gpu, JSON in out/cuda.
#
#   bench/cuda.sh [SHAPE]          default: llama-3.2-1b
#
# UNTESTED: no CUDA machine was at hand when this was written, so no figure of the project comes from it. What it needs: the NVIDIA
# driver, the CUDA toolkit (nvcc), cmake, ninja, a C++ compiler, Python 3.10 or newer with venv, and a network for packages.
set -euo pipefail
cd "$(dirname "$0")/.."

SHAPE=${1:-llama-3.2-1b}
OUT=out/cuda
VENV=$OUT/venv
REPEATS=${REPEATS:-7}

for tool in nvidia-smi nvcc cmake ninja c++ "${PYTHON:=python3}"; do
    command -v "$tool" >/dev/null || { echo "$tool is missing" >&2; exit 2; }
done
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/gpu.csv"

if [ ! -x "$VENV/bin/edgepatch" ]; then
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --constraint constraints.txt torch
    # The cached wheel of llama-cpp-python may be the CPU's: compile it anew.
    CMAKE_ARGS="-DGGML_CUDA=on" "$VENV/bin/pip" install --no-cache-dir --no-binary llama-cpp-python --constraint constraints.txt llama-cpp-python
    "$VENV/bin/pip" install --quiet --constraint constraints.txt --editable '.[all,dev]'
    # Both builds of onnxruntime are the same module: the one for CUDA must be the only one. onnxruntime-genai stays the CPU's.
    version=$("$VENV/bin/pip" list --format=freeze | sed -n 's/^onnxruntime==//p')
    "$VENV/bin/pip" uninstall --quiet --yes onnxruntime
    "$VENV/bin/pip" install --quiet "onnxruntime-gpu[cuda,cudnn]==$version"
fi

"$VENV/bin/python" - <<'PYTHON'
import sys
import llama_cpp
import onnxruntime

if not llama_cpp.llama_supports_gpu_offload():
    sys.exit("llama.cpp was compiled without CUDA")
if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
    sys.exit(f"onnxruntime has no CUDA provider: {onnxruntime.get_available_providers()}")
PYTHON

failed=0
for kind in Q4_0 Q4_K_M Q8_0 int4 int8; do
    # A quantization that fails is told and the others still run; the exit code says so at the end. onnxruntime-genai's CPU build
    # cannot stand beside a GPU, so that ONNX runs without it.
    arms=(); case $kind in int*) arms=(--arms "seed,text-*,* patches") ;; esac
    "$VENV/bin/edgepatch" bench latency --shape "$SHAPE" --quantization "$kind" --device cuda --repeats "$REPEATS" \
        "${arms[@]}" --out "$OUT/latency-$SHAPE-$kind.json" >"$OUT/latency-$SHAPE-$kind.log" \
        || { echo "$kind failed: see $OUT/latency-$SHAPE-$kind.log" >&2; failed=1; }
done
ls -l "$OUT"/*.json
exit $failed
