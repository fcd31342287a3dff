#!/usr/bin/env bash
# The GPU tables of docs/speed.md: both published models, inference on 1024x2048 in windows of 512 and a training step at
# batch 16, 512x512, and the published order of work in float32; then parity in float32. About an hour of one GPU.
# With another device and sizes for a trial:
#   DEVICE=cpu PRESETS=tiny SIZE=224x448 CROP=64x64 BATCH=2 OUT=/tmp/trial bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda} out=${OUT:-benchmarks/results}
for preset in ${PRESETS:-clip_vit_b16 eva02_clip_l14}; do
  python benchmarks/inference_speed.py --preset "$preset" --size "${SIZE:-1024x2048}" --device "$device" --out "$out" \
    --only published-order,ours-exact,ours-bf16,ours-compiled-bf16,mask2former-swin-b,mask2former-swin-b-bf16
  python benchmarks/training_speed.py --preset "$preset" --size "${CROP:-512x512}" --batch-size "${BATCH:-16}" \
    --device "$device" --precision bf16 --compile inductor --out "$out"
done
python tests/parity.py
