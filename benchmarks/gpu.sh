#!/usr/bin/env bash
# Everything worth knowing on a lent GPU, in one go; the results come back as $OUT/results.tgz. Nothing is downloaded: wheels of what the machine
# lacks (tyro, tokenizers, tqdm and what they need) lie in ./wheels if they were carried along. Rivals are measured if their wheels lie there too:
#   liger-kernel, flash-linear-attention with fla-core and transformers, mamba-ssm and causal-conv1d, flash-attn, hyper-connections, geoopt,
#   pogo-torch, pytorch-metric-learning; scattermoe and triton-kernels, built from github.com/shawntan/scattermoe and from python/triton_kernels of
#   the Triton installed (what PyPI calls triton-kernels is another package); sonic-moe with quack-kernels and nvidia-cutlass-dsl (Python >= 3.12);
#   tile-kernels below 2 with tilelang; transformer-engine with transformer-engine-torch and the transformer-engine-cu* of the CUDA installed.
#   mamba-ssm, causal-conv1d, flash-attn and transformer-engine-torch are built with the torch and CUDA of the machine. All but transformers go
#   in without their dependencies, so that no torch and no triton is replaced; what one then lacks stands in its row of the table.
#   OUT=/tmp/out bash benchmarks/gpu.sh [minutes for the WikiText-2 comparison, default 5]
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${OUT:?set OUT to a folder}"
archive=$OUT/results.tgz
minutes=${1:-5}
OUT=$(mktemp -d)
trap 'tar -czf "$archive" -C "$OUT" --exclude "*.safetensors" .' EXIT

step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

step "install"
[ -d wheels ] && python -m pip install -q --no-index --find-links wheels tyro tokenizers tqdm hypothesis pytest
rivals="liger-kernel fla-core flash-linear-attention causal-conv1d mamba-ssm flash-attn hyper-connections geoopt pogo-torch
  pytorch-metric-learning scattermoe triton-kernels nvidia-cutlass-dsl quack-kernels sonic-moe tilelang tile-kernels
  transformer-engine transformer-engine-cu12 transformer-engine-cu13 transformer-engine-torch"
carried() { # pip's arguments, the last of them the package
  python -m pip install -q --no-index --find-links wheels "$@" 2> "$OUT/pip.txt" ||
    echo "not installed: ${!#}: $(grep ERROR "$OUT/pip.txt" | tail -n 1)"
}
if [ -d wheels ]; then
  carried transformers
  for name in $rivals; do carried --no-deps "$name"; done
fi
GRASSLAND_BUILD=1 python -m pip install -q --no-build-isolation --no-deps -e . || python -m pip install -q --no-deps -e .
python -m grassland.train env | tee "$OUT/env.txt"

step "tests on the GPU"
python -m pytest tests -m gpu -q --junitxml "$OUT/gpu-tests.xml" --support "$OUT/support-gpu.jsonl" 2>&1 | tail -n 30 | tee "$OUT/gpu-tests.txt"

step "compute-sanitizer"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    "$sanitizer" --tool "$tool" --error-exitcode 9 python -m pytest tests/kernels -m gpu -q -k "small or odd" \
      > "$OUT/$tool.txt" 2>&1
    echo "$tool: exit code $?"
  done
else
  echo "compute-sanitizer is not on this machine" | tee "$OUT/memcheck.txt"
fi

step "kernel benchmarks"
ops=$(python -c 'from grassland.kernels import dispatch; print(*dispatch.PACKAGES)')
for op in $ops; do
  for dtype in float32 bfloat16; do
    python -m grassland.kernels.bench "$op" --device cuda --dtype "$dtype" --out "$OUT" > "$OUT/$op-$dtype.md" 2>&1
    tail -n 40 "$OUT/$op-$dtype.md"
  done
done

step "scaling and profile"
python -m grassland.kernels.bench all --device cuda --dtype bfloat16 --scaling --out "$OUT" > "$OUT/scaling.md" 2>&1
python -m grassland.train profile --models all --steps 5 --device cuda --dtype bf16 --batch-size 32 --out "$OUT/profile"

step "WikiText-2"
data=../shared/data
[ -d "$data" ] || data=shared/data
# Resumes where the time ran out, if the folder is carried to the next machine.
timeout "${minutes}m" python -m grassland.train compare wikitext2-paper --only wikitext2-6l --out "$OUT/wikitext2-paper" \
  --settings dtype=bf16 "data=$data/wikitext-2" "tokenizer=$data/bert-base-uncased/vocab.txt"
step "done"
