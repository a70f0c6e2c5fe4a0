#!/usr/bin/env bash
# Checks and times everything that needs a GPU; prints a report for benchmarks/results/. Needs Python 3.12, torch 2.11 or
# newer, tokenizers, safetensors, jinja2, numpy, tqdm, pyyaml and pytest; no Ray, no OpenTelemetry, no installation.
#
#   benchmarks/gpu.sh            # on cuda
#   DEVICE=cpu benchmarks/gpu.sh # the same on a CPU, to try the script itself
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$PWD" "$site/kvasir"
export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1

echo "# $(date -u +%Y-%m-%d), $device"
"$python" - <<'PY'
import platform, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
print(f"{name}; Python {platform.python_version()}, torch {torch.__version__}")
PY
echo "## tests of kernels and engine"
"$python" -P -m pytest -q -p no:cacheprovider -W default tests/kernels tests/engine
echo "## greedy tokens on $device against the CPU, float32"
"$python" benchmarks/device_parity.py --device "$device"
echo "## a process group of one, then sums over all GPUs (two ranks on a CPU) by each way"
"$python" benchmarks/sums.py --device "$device" --ranks 1
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
[ "$device" = cuda ] && [ "$gpus" -lt 2 ] || "$python" benchmarks/sums.py --device "$device"
echo "## the engine, skald"
"$python" -P -m kvasir.cluster.cli bench engine skald --device "$device"
echo "## the engine, random 1B"
"$python" benchmarks/checkpoint.py 1B "$site/1B"
"$python" -P -m kvasir.cluster.cli bench engine "$site/1B" --device "$device" --sequences 1 8 32 128
