#!/usr/bin/env bash
# SYNTHIA -> Cityscapes, BDD100K, Mapillary Vistas with CLIP ViT-B/16
#
# Setting   trained on SYNTHIA-RAND-CITYSCAPES alone (RobustNet's training list),
#           tested on the validation parts of Cityscapes (500 frames), BDD100K (1,000) and Mapillary Vistas (2,000)
#           terrain, truck and train do not occur in SYNTHIA: the mean is taken over the other 16 classes
# Data      SYNTHIA     prepare_synthia.py, from SYNTHIA-RAND-CITYSCAPES
#           Cityscapes  prepare_cityscapes.py, from leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip
#           BDD100K     prepare_bdd100k.py, from pictures and semantic masks of its 10k part
#           Mapillary   prepare_mapillary.py, from Vistas with its v1.2 labels (map: robustnet, as published)
# Bill      20,000 steps of 8 pictures of 512x512 per process. How many processes is left to the launch command, here as
#           in the published files (the paper's text speaks of 16 pictures a step: two); without LAUNCH it is one for
#           each GPU of the machine. GPUs and hours: not measured. Memory: --dry-run tells.
# Expected  the figure of the tables of arXiv 2407.09033, if they have this setting; they were not at hand here
# Ours      not measured yet
#
# Downloads are expected in $RAW, each in a folder of its own, unpacked. Further options go to train.py.
#   bash recipes/synthia_clip_vit_b.sh
#   bash recipes/synthia_clip_vit_b.sh --resume
#   LAUNCH="--config_file recipes/accelerate/ddp.yaml" DATA=/disk/data bash recipes/synthia_clip_vit_b.sh --workers 8
# Cheaper, but no longer the published setting, and not measured:
#   RUN=runs/frozen bash recipes/synthia_clip_vit_b.sh --vision frozen
#   RUN=runs/lora bash recipes/synthia_clip_vit_b.sh --vision lora --vision-lr-mult 10
#   RUN=runs/less_memory bash recipes/synthia_clip_vit_b.sh --gradient-checkpointing
#   RUN=runs/bf16 bash recipes/synthia_clip_vit_b.sh --mixed-precision bf16
set -euo pipefail
cd "$(dirname "$0")/.."
RAW=${RAW:-downloads} DATA=${DATA:-data} START=${START:-models/clip_vit_b16} RUN=${RUN:-runs/synthia_clip_vit_b}

# Data. What is already made is left alone.
for name in synthia cityscapes bdd100k mapillary; do
    [ -f "$DATA/$name/manifest.json" ] || python "dataset_scripts/prepare_$name.py" "$RAW/$name" "$DATA/$name"
done

# Start. OpenAI's CLIP, downloaded. (With OpenAI's file: ViT-B-16.pt, and no --from.)
[ -d "$START" ] || python convert_checkpoint.py openai/clip-vit-base-patch16 "$START" \
    --init clip_vit_b16 --from transformers --seed 2023

# Training.
# As published where our defaults are otherwise: the frozen tower drops paths at random, whole pictures are resized with
# OpenCV's rounding, and every process divides its losses by its own counts.
accelerate launch ${LAUNCH:-} train.py \
    --model "$START" --data "$DATA/synthia" --eval-data "$DATA/cityscapes" --eval-box 1024 2048 \
    --out "$RUN" --seed 2023 --save-every 2000 --eval-every 2000 --workers 4 \
    --steps 20000 --batch-size 8 --crop 512 --warmup-steps 1500 \
    --lr 1e-5 --vision-lr-mult 0.1 \
    --noisy-reference --resize whole --loss-counts published "$@"

# Test, of the last model; best/ was chosen by Cityscapes, which is a test set here. A dry run leaves none.
[ -d "$RUN/model" ] || exit 0
python evaluate_tqdm.py "$RUN/model" --protocol published --out "$RUN/test" \
    --data cityscapes="$DATA/cityscapes" bdd100k="$DATA/bdd100k" mapillary="$DATA/mapillary"
