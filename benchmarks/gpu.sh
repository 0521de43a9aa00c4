#!/usr/bin/env bash
# Every check that needs a GPU, in one command: the tests marked cuda, the kernels beside copies and torch's optimizers,
# SignMuon's step beside Muon's, steps over slow networks where there are namespaces, sharded models, the Trainer's and
# Fabric's strategies where there are GPUs for two copies, then the demos. Keras' wants a TensorFlow built for GPUs: pip
# install tensorflow[and-cuda] in place of tensorflow-cpu. It goes on after a failure and says at the end what failed.
#     benchmarks/gpu.sh [OUT]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/results/gpu}
mkdir -p "$out"
failed=()
check() { "$@" || failed+=("$*"); }

check nvidia-smi --query-gpu=name,memory.total --format=csv
check python -m pytest -m cuda
check python -m benchmarks.kernels --device cuda --parameters 100000000 --out "$out"
check python -m benchmarks.muon_step --device cuda --models "GPT 4x256" "GPT 12x768" ResNet-8 --out "$out"
check python -m benchmarks.wire --device cuda --mbits 1000 10000 --millions 25 --batch-size 2048 --out "$out"
gpus=$(nvidia-smi --list-gpus | wc -l)
if [ "$gpus" -gt 0 ] && [ $((gpus % 2)) = 0 ]; then
    check torchrun --standalone --nproc-per-node "$gpus" -m benchmarks.sharded --device cuda --width 4096 --out "$out"
else
    echo "$gpus GPU: benchmarks.sharded needs an even number"
fi
check python -m signsgd_lightning --out "$out"
check python -m signsgd_keras --out "$out"
printf '%s failed\n' "${failed[@]-nothing}"
[ ${#failed[@]} = 0 ]
