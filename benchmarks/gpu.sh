#!/usr/bin/env bash
# Checks and times everything that needs a GPU, in under 9 minutes; prints a report for benchmarks/results/. Needs Python 3.12,
# torch 2.11 or newer with its Triton, tokenizers, safetensors, jinja2, numpy, tqdm, pyyaml, llguidance and pytest; no Ray, no
# OpenTelemetry, no installation. transformers is measured beside it if it is there.
#
#   benchmarks/gpu.sh            # on cuda
#   DEVICE=cpu benchmarks/gpu.sh # the same on a CPU, to try the script itself in 5 minutes: fewer tests, small models
#                                # (Triton 3.6 interprets loops over what isn't known beforehand only with numpy before 2.4)
#   OUT=folder                   # figures as JSON go there, too; stages.jsonl says how every stage ended; backends.json is to
#                                # become kernels/backends.json, by which ops take the backend that was fastest on such a GPU
#   TESTS="tests/kernels"        # what is tested; default: Triton's kernels
#   SECONDS_IN_ALL=530           # what is begun later is left out, and said so
#
# A table of all stages comes last, also when the script is stopped: figures are written as they are found.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda} python=${PYTHON:-python3} failed=0 current=
[ "$device" = cuda ] && in_all=${SECONDS_IN_ALL:-530} || in_all=${SECONDS_IN_ALL:-295}
site=$(mktemp -d)
trap finish EXIT
trap 'failed=1; kill $(jobs -p) 2>/dev/null; exit 143' INT TERM
ln -s "$PWD" "$site/kvasir"
out=${OUT:-$site/out} table=()
mkdir -p "$out"
: >"$out/stages.jsonl"
export PYTHONPATH=$site:$PWD/tests/support PYTHONDONTWRITEBYTECODE=1 TRITON_INTERPRET=0
tests=${TESTS:-$(echo tests/kernels/test_{triton_{attention,experts,linear,rows,sample,strides},torch_operators}.py)} shape=1B sequences="1 8 32 128" swept=(8B --batch 1 64 --contexts 512 4000 --outputs 64 --repeat 2) into=(--table "$out/backends.json") models=() tokens=() few=() work=(--batch 1 32 --prompt 512 --outputs 64)
if [ "$device" != cuda ]; then
  export TRITON_INTERPRET=1 # Triton's kernels on a CPU
  into=() swept=(10M --batch 1 4 --contexts 64 --outputs 8)
  tests=${TESTS:-tests/kernels/test_triton_sample.py} shape=10M sequences="1 4" models=(--model tiny "tiny latent" --repeat 1)
  tokens=(--input-len 32 --output-len 8) few=(--prompts 6 --longest 120) work=(--batch 1 --prompt 32 --outputs 8 --only Kvasir "transformers, generate")
fi

finish() {
  [ -z "$current" ] || note "$current" 0 "stopped with the script"
  echo "## $SECONDS s in all$([ $failed = 0 ] || echo ", and something failed")"
  printf '%s\n' "| stage | seconds | outcome |" "|---|---|---|" "${table[@]}"
  rm -rf "$site"
}
# note NAME SECONDS OUTCOME: into the table and the file
note() {
  table+=("| $1 | $2 | $3 |")
  printf '{"stage": "%s", "seconds": %d, "outcome": "%s"}\n' "$1" "$2" "$3" >>"$out/stages.jsonl"
}

# stage NAME LIMIT COMMAND: with at most LIMIT seconds of those that are left
stage() {
  local name=$1 limit=$2 begun=$SECONDS code=0
  shift 2
  echo "## $name"
  current=$name
  if ((SECONDS + 10 > in_all)); then
    echo "left out: there are no 10 s left of $in_all"
    note "$name" 0 "left out"
    current=
    failed=1
    return
  fi
  ((SECONDS + limit > in_all)) && limit=$((in_all - SECONDS))
  timeout -k 5 "$limit" "$@" & # waited for, so that a signal is heeded at once
  wait $! || code=$?
  local outcome=ok
  [ $code = 0 ] || { failed=1 outcome="exit status $code"; }
  [ $code = 124 ] || [ $code = 137 ] && outcome="stopped after $limit s"
  [ $code = 0 ] || echo "FAILED: $outcome"
  note "$name" $((SECONDS - begun)) "$outcome"
  current=
  echo "($((SECONDS - begun)) s)"
}
# without the configuration and fixtures of the other tests, which want Ray, browsers' libraries and plugins
check() { stage "$1" "$2" "$python" -P -m pytest -q -c /dev/null --rootdir . --confcutdir tests/kernels -p no:cacheprovider \
  --import-mode=importlib "${@:3}"; }
engine() { stage "the engine, $1" 75 "$python" -P -m kvasir.cluster.cli bench engine "${@:3}" --device "$device" \
  --out "$out/engine-$2.json" "${tokens[@]}"; }

echo "# $(date -u +%Y-%m-%d), $device"
"$python" - <<'PY'
import platform, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
print(f"{name}; Python {platform.python_version()}, torch {torch.__version__}")
PY
stage "greedy tokens on $device against the CPU, float32" 90 env KVASIR_CHECK_GRAPHS=1 "$python" benchmarks/device_parity.py --device "$device"
stage "kernels" 120 "$python" benchmarks/kernels.py --device "$device" "${models[@]}" "${into[@]}" --seconds 90 --json "$out/kernels.json"
engine skald skald skald
stage "a random $shape" 60 "$python" benchmarks/checkpoint.py "$shape" "$site/$shape"
engine "random $shape" "$shape" "$site/$shape" --sequences $sequences
stage "a random ${swept[0]} beside the ceilings" 90 "$python" benchmarks/engine.py --device "$device" --json "$out/sweep.json" --sweep "${swept[@]}"
stage "the same bits in any batch, --deterministic" 60 env KVASIR_CHECK_GRAPHS=1 "$python" benchmarks/determinism.py --device "$device" "${few[@]}"
engine "random $shape, --deterministic" "$shape-deterministic" "$site/$shape" --sequences $sequences --deterministic
engine "random $shape, without CUDA graphs" "$shape-eager" "$site/$shape" --sequences $sequences --enforce-eager
stage "a process group of one" 30 "$python" benchmarks/sums.py --device "$device" --ranks 1
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
[ "$device" = cuda ] && [ "$gpus" -lt 2 ] || stage "sums over all GPUs (two ranks on a CPU) by each way" 45 "$python" benchmarks/sums.py --device "$device" "${into[@]}"
check "tests of kernels" 150 $tests
stage "beside transformers, where it is installed" 150 \
  "$python" benchmarks/peers/compare.py --device "$device" --model "$shape" --folder "$site" --batching --long 0 "${work[@]}" \
  --limit 45 --json "$out/peers.json"
if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
  checked=$(echo tests/kernels/test_triton_{attention,rows,sample,experts,linear}.py)
  which="head_dims or inside or (turning and (0 or 1)) or (8_bits and 80) or (sums_of_squares and 37 and dtype1)"
  which+=" or (draws and 50) or scores or penalties or (routes and top2 and 24) or (experts and 37 and biased and dtype1)"
  which+=" or (products and 33 and 129 and dtype1)"
  for tool in memcheck racecheck; do
    # torch's allocator hands out parts of large pieces: without it, each tensor's end is an end that memcheck knows
    [ $tool = memcheck ] && alone=1 || alone=0
    stage "Triton kernels under compute-sanitizer: $tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=$alone \
      compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -P -m pytest -q -c /dev/null --rootdir . --confcutdir tests/kernels -p no:cacheprovider \
      --import-mode=importlib $checked -k "$which"
  done
fi
exit $failed
