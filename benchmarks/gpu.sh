#!/usr/bin/env bash
# Everything worth knowing on a lent GPU; the results come back as $OUT/results.tgz. Nothing is downloaded: wheels of what the machine lacks (tyro,
# tokenizers, tqdm and what they need) lie in ./wheels if they were carried along, an extension built elsewhere in kernels/_C.abi3.so, else it is
# built. Rivals are measured if their wheels lie there too:
#   liger-kernel, flash-linear-attention with fla-core and transformers, mamba-ssm and causal-conv1d, flash-attn, hyper-connections, geoopt,
#   pogo-torch, pytorch-metric-learning; scattermoe and triton-kernels, built from github.com/shawntan/scattermoe and from python/triton_kernels of
#   the Triton installed (what PyPI calls triton-kernels is another package); sonic-moe with quack-kernels and nvidia-cutlass-dsl (Python >= 3.12);
#   tile-kernels below 2 with tilelang; transformer-engine with transformer-engine-torch and the transformer-engine-cu* of the CUDA installed.
#   mamba-ssm, causal-conv1d, flash-attn and transformer-engine-torch are built with the torch and CUDA of the machine. All but transformers go
#   in without their dependencies, so that no torch and no triton is replaced; what one then lacks stands in its row of the table.
#   OUT=/tmp/out DATA=../shared/data bash benchmarks/gpu.sh [install tests warm bench compare sanitizer scaling profile]
# What is worth most comes first. `warm` compiles, while the tests run, what `bench` will measure alone; `compare` trains WikiText-2's table of 6
# layers, which 265 s were too few for on an H200 with other work, and `sanitizer` looks on. A second call on the same machine names the stages that are missing.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${OUT:?set OUT to a folder}"
archive=$OUT/results.tgz
results=${RESULTS:-/tmp/grassland-results}
data=${DATA:-../shared/data}
mkdir -p "$results"
# Packed after every stage: what outlives its time is killed in the middle of whatever it does.
pack() { tar -czf "$results.tgz" -C "$results" --exclude "*.safetensors" --exclude tokenizer.json . && cp "$results.tgz" "$archive"; }
trap pack EXIT
export PYTHONUNBUFFERED=1 TRITON_CACHE_AUTOTUNING=1
stages=${*:-install tests warm bench compare sanitizer scaling profile}
ops="plucker kronecker subspace moe"

step() {
  pack
  printf '\n== %s (%ss)\n' "$1" "$SECONDS"
}
wanted() { [[ " $stages " == *" $1 "* ]]; }

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
    GRASSLAND_BUILD=0 python3 -m pip install -q --no-build-isolation --no-deps -e .
  else
    GRASSLAND_BUILD=1 python3 -m pip install -q --no-build-isolation --no-deps -e . || python3 -m pip install -q --no-deps -e .
  fi
  python3 -m grassland.train env | tee "$results/env.txt"
}

tests() {
  python3 -m pytest tests -m gpu -q -n 8 --junitxml "$results/gpu-tests.xml" --support "$results/support-cuda.jsonl" > "$results/gpu-tests.txt" 2>&1
  grep -a "^FAILED\|^ERROR\|passed\|failed" "$results/gpu-tests.txt"
}

sanitizer() {
  local tool program
  program=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
  [ -n "$program" ] || { echo "compute-sanitizer is not on this machine"; return; }
  for tool in memcheck racecheck; do
    timeout "${SANITIZER_S:-600}" "$program" --tool "$tool" --error-exitcode 9 python3 -m pytest tests/kernels -m gpu -q -k "small or odd" \
      > "$results/$tool.txt" 2>&1
    echo "$tool: exit code $?, $(grep -a 'ERROR SUMMARY\|RACECHECK SUMMARY' "$results/$tool.txt" | tail -n 1)"
  done
}

compare() { # resumes where the time ran out
  if command -v nvidia-cuda-mps-control > /dev/null; then # kernels of several runs at once: a quarter less time on an H200
    export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps-log
    mkdir -p /tmp/mps /tmp/mps-log
    nvidia-cuda-mps-control -d
  fi
  python3 -m grassland.train compare wikitext2-paper --only wikitext2-6l --out "$results/wikitext2-paper" --jobs "${JOBS:-6}" ${COMPARE:-} \
    --settings dtype=bf16 cuda_graph=True "data=$data/wikitext-2" "tokenizer=$data/bert-base-uncased/vocab.txt" ${SETTINGS:-}
  if [ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ]; then echo quit | nvidia-cuda-mps-control; fi
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

bench() { # repeats, folder
  local op dtype
  for op in $ops; do
    for dtype in ${DTYPES:-bfloat16 float32}; do
      python3 -m grassland.kernels.bench "$op" --device cuda --dtype "$dtype" --repeats "$1" --out "$2" > "$2/$op-$dtype.md" 2> "$2/$op-$dtype.txt"
      echo "$op $dtype: exit code $? (${SECONDS}s)"
      pack
    done
  done
}

if wanted install; then step "install"; install; fi
if wanted warm; then mkdir -p "$results/warm"; (for op in $ops; do ops=$op bench 1 "$results/warm" & done; wait) > "$results/warm.txt" 2>&1 & fi
if wanted tests; then step "tests on the GPU"; tests; fi
wait
if wanted bench; then step "kernels"; bench "${REPEATS:-15}" "$results"; fi
step "what shares the GPU"
if wanted sanitizer; then sanitizer & fi
if wanted compare; then compare; fi
wait
if wanted scaling; then
  step "scaling"
  python3 -m grassland.kernels.bench all --device cuda --dtype bfloat16 --scaling --out "$results" > "$results/scaling.md" 2>&1
fi
if wanted profile; then
  step "profile"
  python3 -m grassland.train profile --models all --steps 5 --device cuda --dtype bf16 --batch-size 32 --out "$results/profile"
fi
step "done"
