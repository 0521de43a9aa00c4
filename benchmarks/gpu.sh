#!/usr/bin/env bash
# Every check that needs a GPU, in one command: the tests marked cuda, the kernels beside copies and torch's optimizers,
# then the demos on all GPUs. For Keras' it takes a TensorFlow built for them: pip install tensorflow[and-cuda] in place
# of tensorflow-cpu.
#     benchmarks/gpu.sh [OUT]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-signsgd_demo}
nvidia-smi --query-gpu=name,memory.total --format=csv
python -m pytest -m cuda
python -m benchmarks.kernels --out "$out"
python -m signsgd_lightning --out "$out"
python -m signsgd_keras --out "$out"
