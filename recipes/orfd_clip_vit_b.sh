#!/usr/bin/env bash
# ORFD -> ORFD with CLIP ViT-B/16: two classes, off the road
#
# Setting   trained on ORFD's training part (21 scenes), tested on its testing part (6 other scenes); the classes are
#           non-traversable, which the sky belongs to, and traversable. The authors' repository has no off-road
#           setting: this is its recipe for GTA5 on other data
# Data      ORFD        prepare_orfd.py, from the official download, whose folders have a level of scenes
# Bill      20,000 steps of 8 pictures of 512x512 per process. How many processes is left to the launch command, here as
#           in the published files (the paper's text speaks of 16 pictures a step: two); without LAUNCH it is one for
#           each GPU of the machine. GPUs and hours: not measured. Memory: --dry-run tells.
# Expected  nothing was published for this model on ORFD, as far as was known here
# Ours      not measured yet
#
# Downloads are expected in $RAW, each in a folder of its own, unpacked. Further options go to train.py.
#   bash recipes/orfd_clip_vit_b.sh
#   bash recipes/orfd_clip_vit_b.sh --resume
#   LAUNCH="--config_file recipes/accelerate/ddp.yaml" DATA=/disk/data bash recipes/orfd_clip_vit_b.sh --workers 8
# Cheaper, but no longer the published setting, and not measured:
#   RUN=runs/frozen bash recipes/orfd_clip_vit_b.sh --vision frozen
#   RUN=runs/lora bash recipes/orfd_clip_vit_b.sh --vision lora --vision-lr-mult 10
#   RUN=runs/less_memory bash recipes/orfd_clip_vit_b.sh --gradient-checkpointing
#   RUN=runs/bf16 bash recipes/orfd_clip_vit_b.sh --mixed-precision bf16
set -euo pipefail
cd "$(dirname "$0")/.."
RAW=${RAW:-downloads} DATA=${DATA:-data} START=${START:-models/clip_vit_b16} RUN=${RUN:-runs/orfd_clip_vit_b}

# Data. What is already made is left alone.
[ -f "$DATA/orfd/manifest.json" ] || python dataset_scripts/prepare_orfd.py "$RAW/orfd" "$DATA/orfd"

# Start. OpenAI's CLIP, downloaded. (With OpenAI's file: ViT-B-16.pt, and no --from.)
[ -d "$START" ] || python convert_checkpoint.py openai/clip-vit-base-patch16 "$START" \
    --init clip_vit_b16 --from transformers --seed 2023

# Training. The two classes are those of the data; best/ is chosen by ORFD's validation part.
# As published where our defaults are otherwise: the frozen tower drops paths at random, whole pictures are resized with
# OpenCV's rounding, and every process divides its losses by its own counts.
accelerate launch ${LAUNCH:-} train.py \
    --model "$START" --data "$DATA/orfd" \
    --out "$RUN" --seed 2023 --save-every 2000 --eval-every 2000 --workers 4 \
    --steps 20000 --batch-size 8 --crop 512 --warmup-steps 1500 \
    --lr 1e-5 --vision-lr-mult 0.1 \
    --noisy-reference --resize whole --loss-counts published "$@"

# Test, at the pictures' own 1280x720. A dry run leaves no model.
[ -d "$RUN/model" ] || exit 0
python evaluate_tqdm.py "$RUN/model" --data orfd="$DATA/orfd:test" --out "$RUN/test"
