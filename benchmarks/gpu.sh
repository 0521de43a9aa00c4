#!/usr/bin/env bash
# Every check that needs a GPU, in one command: the tests marked cuda, then the demo on all GPUs.
#     benchmarks/gpu.sh [OUT]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-signsgd_demo}
nvidia-smi --query-gpu=name,memory.total --format=csv
python -m pytest -m cuda
python -m signsgd_lightning --out "$out"
