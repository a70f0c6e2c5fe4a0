#!/usr/bin/env bash
# Checks and times everything that needs a GPU; prints a report for benchmarks/results/. Needs Python 3.12, torch 2.11 or
# newer, tokenizers, safetensors, jinja2, numpy, tqdm, pyyaml and pytest; no Ray, no OpenTelemetry, no installation.
#
#   benchmarks/gpu.sh            # on cuda
#   DEVICE=cpu benchmarks/gpu.sh # the same on a CPU, to try the script itself
#   OUT=folder                   # figures as JSON go there, too
#   TESTS="tests/kernels"        # what is tested; default: kernels and engine
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$PWD" "$site/kvasir"
out=${OUT:-$site}
mkdir -p "$out"
export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1

echo "# $(date -u +%Y-%m-%d), $device"
"$python" - <<'PY'
import platform, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
print(f"{name}; Python {platform.python_version()}, torch {torch.__version__}")
PY
echo "## tests of kernels and engine"
"$python" -P -m pytest -q -p no:cacheprovider -W default ${TESTS:-tests/kernels tests/engine} || failed=1
if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
  echo "## Triton kernels under compute-sanitizer: bounds, then races"
  for tool in memcheck racecheck; do
    timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -P -m pytest -q -p no:cacheprovider -W default \
      tests/kernels/test_triton_attention.py -k "head_dims or inside" || failed=1
  done
fi
echo "## kernels"
models=() shape=1B sequences="1 8 32 128"
[ "$device" = cuda ] || { models=(--model tiny --repeat 2); shape=125M; sequences="1 4"; }
"$python" benchmarks/gpu_kernels.py --device "$device" "${models[@]}" --json "$out/kernels.json"
echo "## greedy tokens on $device against the CPU, float32"
"$python" benchmarks/device_parity.py --device "$device" || failed=1
echo "## a process group of one, then sums over all GPUs (two ranks on a CPU) by each way"
"$python" benchmarks/sums.py --device "$device" --ranks 1
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
[ "$device" = cuda ] && [ "$gpus" -lt 2 ] || "$python" benchmarks/sums.py --device "$device"
echo "## the engine, skald"
"$python" -P -m kvasir.cluster.cli bench engine skald --device "$device"
echo "## the engine, random $shape"
"$python" benchmarks/checkpoint.py $shape "$site/model"
"$python" -P -m kvasir.cluster.cli bench engine "$site/model" --device "$device" --sequences $sequences
echo "## the same without CUDA graphs"
"$python" -P -m kvasir.cluster.cli bench engine "$site/model" --device "$device" --sequences $sequences --enforce-eager
exit "${failed:-0}"
