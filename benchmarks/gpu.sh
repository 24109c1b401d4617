#!/usr/bin/env bash
# Everything worth knowing on a lent GPU; the results come back as $OUT/results.tgz. Nothing is downloaded: wheels of what the machine lacks (tyro,
# tokenizers, tqdm and what they need) lie in ./wheels if they were carried along, an extension built elsewhere in kernels/_C.abi3.so, else it is
# built. Rivals are measured if their wheels lie there too:
#   liger-kernel, cut-cross-entropy, flash-linear-attention with fla-core and transformers, mamba-ssm and causal-conv1d, flash-attn, hyper-connections, geoopt,
#   pogo-torch, pytorch-metric-learning; scattermoe and triton-kernels, built from github.com/shawntan/scattermoe and from python/triton_kernels of
#   the Triton installed (what PyPI calls triton-kernels is another package); sonic-moe with quack-kernels and nvidia-cutlass-dsl (Python >= 3.12);
#   tile-kernels below 2 with tilelang; transformer-engine with transformer-engine-torch and the transformer-engine-cu* of the CUDA installed.
#   mamba-ssm, causal-conv1d, flash-attn and transformer-engine-torch are built with the torch and CUDA of the machine. All but transformers go
#   in without their dependencies, so that no torch and no triton is replaced; what one then lacks stands in its row of the table.
#   OUT=/tmp/out bash benchmarks/gpu.sh [install tests warm bench compare sanitizer scaling profile]
# LIMIT: seconds after which the script has ended, of its own accord; what does not fit is cut short or left out. What is worth most comes first.
# `warm` compiles, while the tests run, what `bench` will measure alone; `compare` trains WikiText-2's table of 6 layers (six runs at once took five
# minutes of an H200), and finishes what fits. A second call on the same machine names the stages that are missing; on another machine it goes on where a
# results.tgz of the first lies in the repository's root. DATA has wikitext-2 and bert-base-uncased/vocab.txt; what lies in ./shared travels. Without
# them `compare` is left out, or refused where it was named.
# Where there is no GPU, DEVICE=cpu, COMPARE and SETTINGS (dtype=float32 cuda_graph=False compile=False steps=9 ...) try the
# script itself. SETUP_S: seconds after which `bench` leaves out a rival that is still setting up; `warm` gives it 100.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${OUT:?set OUT to a folder}"
archive=$OUT/results.tgz
results=${RESULTS:-/tmp/grassland-results}
data=${DATA:-shared/data}
device=${DEVICE:-cuda}
limit=${LIMIT:-560}
sanitizer_s=${SANITIZER_S:-60}
export PYTHONUNBUFFERED=1 TRITON_CACHE_AUTOTUNING=1
stages=${*:-install tests warm bench compare sanitizer scaling profile}
ops="plucker kronecker subspace moe cross_entropy"

wanted() { [[ " $stages " == *" $1 "* ]]; }

if wanted compare; then
  for path in "$data/wikitext-2" "$data/bert-base-uncased/vocab.txt"; do
    [ -e "$path" ] && continue
    echo "compare needs $path: set DATA, or copy it into ./shared/data, or leave compare out" >&2
    [ $# -eq 0 ] || exit 2
    stages=${stages/compare /}
    break
  done
fi

mkdir -p "$results"
if [ -e results.tgz ]; then
  tar -xzkf results.tgz -C "$results" 2> /dev/null
  # What was not finished there has left its state behind.
  find "$results" -name metrics.jsonl -exec grep -L '"event": "end"' {} + | while read -r file; do
    compgen -G "$(dirname "$file")/state*.safetensors" > /dev/null || rm -r "$(dirname "$file")"
  done
fi

pack() {
  local file code
  file=$(mktemp "$OUT/.packing-XXXXXX") || return
  tar -czf "$file" -C "$results" --exclude "*.safetensors" --exclude tokenizer.json .
  code=$?
  # 1: a file changed while it was read; it is there as far as it went.
  if [ "$code" -le 1 ]; then mv "$file" "$archive"; else rm -f "$file"; echo "not packed: tar's exit code $code"; fi
}
# What outlives its time is killed in the middle of whatever it does.
(while sleep "${PACK_S:-20}"; do pack; done) > /dev/null 2>&1 &
packer=$!
finish() {
  kill "$packer"
  wait "$packer" 2> /dev/null
  rm -f "$OUT"/.packing-*
  pack
}
trap finish EXIT

left() { # seconds until the limit, with what packing takes and $1 set aside
  local seconds=$((limit - SECONDS - 15 - ${1:-0}))
  echo $((seconds > 0 ? seconds : 0))
}

within() { # command; for as long as there is time
  timeout --kill-after 5 "$(($(left) + 1))" "$@"
}

stage() {
  wanted "$1" || return
  if [ "$(left)" -eq 0 ]; then echo "no time for $1"; return; fi
  printf '\n== %s (%ss)\n' "$1" "$SECONDS"
  "$1"
  pack
}

carried() { # pip's arguments, the last of them the package
  python3 -m pip install -q --no-index --find-links wheels "$@" 2> "$results/pip.txt" ||
    echo "not installed: ${!#}: $(grep ERROR "$results/pip.txt" | tail -n 1)"
}

install() {
  if [ -d wheels ]; then
    carried transformers tyro tokenizers tqdm hypothesis pytest pytest-xdist
    for wheel in wheels/*.whl; do carried --no-deps "$wheel"; done
  fi
  if [ -e kernels/_C.abi3.so ]; then
    GRASSLAND_BUILD=0 within python3 -m pip install -q --no-build-isolation --no-deps -e .
  else
    GRASSLAND_BUILD=1 within python3 -m pip install -q --no-build-isolation --no-deps -e . || within python3 -m pip install -q --no-deps -e .
  fi
  python3 -m grassland.train env | tee "$results/env.txt"
}

tests() {
  within python3 -m pytest tests -m gpu -q -n 8 --junitxml "$results/gpu-tests.xml" --support "$results/support-cuda.jsonl" > "$results/gpu-tests.txt" 2>&1
  echo "exit code $?"
  grep -a "^FAILED\|^ERROR\|passed\|failed" "$results/gpu-tests.txt"
}

measure() { # repeats, folder, seconds that a rival may take to set up
  local op dtype
  for dtype in ${DTYPES:-bfloat16 float32}; do
    for op in $ops; do
      within python3 -m grassland.kernels.bench "$op" --device "$device" --dtype "$dtype" --repeats "$1" --out "$2" --setup-limit "$3" \
        > "$2/$op-$dtype.md" 2> "$2/$op-$dtype.txt"
      echo "$op $dtype: exit code $? (${SECONDS}s)"
    done
  done
}

warm() {
  mkdir -p "$results/warm"
  # What a rival has compiled is kept when its time is up.
  for op in $ops; do ops=$op measure 1 "$results/warm" 100 & done
  wait
}

bench() { measure "${REPEATS:-15}" "$results" "${SETUP_S:-25}"; }

compare() {
  local after=35 settings table # to let the runs save themselves, and for the report
  if wanted sanitizer; then after=$((after + 2 * sanitizer_s)); fi
  if wanted scaling; then after=$((after + 60)); fi
  if wanted profile; then after=$((after + 60)); fi
  if [ "$(left "$after")" -lt 30 ]; then echo "no time for compare"; return; fi
  if command -v nvidia-cuda-mps-control > /dev/null; then # kernels of several runs at once: a quarter less time on an H200
    export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps-log
    mkdir -p /tmp/mps /tmp/mps-log
    nvidia-cuda-mps-control -d
  fi
  settings="dtype=bf16 cuda_graph=True compile=True save_every=0 data=$data/wikitext-2 tokenizer=$data/bert-base-uncased/vocab.txt ${SETTINGS:-}"
  table="wikitext2-paper --only wikitext2-6l --out $results/wikitext2-paper --jobs ${JOBS:-6} ${COMPARE:-} --settings $settings"
  # In the foreground the signal reaches the comparison alone, which passes it on: a second one would stop the runs before they are saved.
  timeout --foreground --kill-after 15 "$(left "$after")" python3 -m grassland.train compare $table
  case $? in
    124 | 137) within python3 -m grassland.train compare $table --report-only ;;
  esac
  if [ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ]; then echo quit | nvidia-cuda-mps-control; fi
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

sanitizer() {
  local tool program
  program=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
  [ -n "$program" ] || { echo "compute-sanitizer is not on this machine"; return; }
  for tool in memcheck racecheck; do
    # Interrupted, pytest and the tool still say what they have found.
    within timeout --signal INT --kill-after 10 "$sanitizer_s" "$program" --tool "$tool" --error-exitcode 9 \
      python3 -m pytest tests/kernels -m gpu -q -k "small or odd" > "$results/$tool.txt" 2>&1
    echo "$tool: exit code $?, $(grep -a 'ERROR SUMMARY\|RACECHECK SUMMARY' "$results/$tool.txt" | tail -n 1)"
  done
}

scaling() {
  within python3 -m grassland.kernels.bench all --device "$device" --dtype bfloat16 --scaling --out "$results" > "$results/scaling.md" 2>&1
  echo "exit code $?"
}

profile() {
  within python3 benchmarks/host.py --device "$device" --out "$results" > "$results/host.txt" 2>&1
  echo "host: exit code $?"
  within python3 benchmarks/decode.py --device "$device" --dtype bfloat16 --out "$results" > "$results/decode.txt" 2>&1
  echo "decode: exit code $?"
  within python3 -m grassland.train profile --models all --steps 5 --device "$device" --dtype bf16 --batch-size 32 --out "$results/profile"
}

stage install
if wanted warm; then warm > "$results/warm.txt" 2>&1 & fi
warming=${!:-}
stage tests
if wanted warm; then wait "$warming"; fi
stage bench
stage compare
stage sanitizer
stage scaling
stage profile
echo "done (${SECONDS}s)"
