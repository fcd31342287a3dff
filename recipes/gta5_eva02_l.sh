#!/usr/bin/env bash
# GTA5 -> Cityscapes, BDD100K, Mapillary Vistas with EVA02-CLIP-L/14-336
#
# Setting   trained on GTA5 alone (RobustNet's training list),
#           tested on the validation parts of Cityscapes (500 frames), BDD100K (1,000) and Mapillary Vistas (2,000)
# Data      GTA5        prepare_gta5.py, from the ten image and ten label archives of "Playing for Data"
#           Cityscapes  prepare_cityscapes.py, from leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip
#           BDD100K     prepare_bdd100k.py, from pictures and semantic masks of its 10k part
#           Mapillary   prepare_mapillary.py, from Vistas with its v1.2 labels (map: robustnet, as published)
# Bill      20,000 steps of 8 pictures of 512x512 per process. How many processes is left to the launch command, here as
#           in the published files (the paper's text speaks of 16 pictures a step: two); without LAUNCH it is one for
#           each GPU of the machine. GPUs and hours: not measured. Memory: --dry-run tells.
# Expected  68.9 mIoU on Cityscapes (abstract of arXiv 2407.09033); on the others the figures of its tables, which
#           were not at hand here
# Ours      not measured yet
#
# Downloads are expected in $RAW, each in a folder of its own, unpacked. Further options go to train.py.
#   bash recipes/gta5_eva02_l.sh
#   bash recipes/gta5_eva02_l.sh --resume
#   LAUNCH="--config_file recipes/accelerate/ddp.yaml" DATA=/disk/data bash recipes/gta5_eva02_l.sh --workers 8
# Cheaper, but no longer the published setting, and not measured:
#   RUN=runs/frozen bash recipes/gta5_eva02_l.sh --vision frozen
#   RUN=runs/lora bash recipes/gta5_eva02_l.sh --vision lora --vision-lr-mult 10
#   RUN=runs/less_memory bash recipes/gta5_eva02_l.sh --gradient-checkpointing
#   RUN=runs/bf16 bash recipes/gta5_eva02_l.sh --mixed-precision bf16
set -euo pipefail
cd "$(dirname "$0")/.."
RAW=${RAW:-downloads} DATA=${DATA:-data} START=${START:-models/eva02_clip_l14} RUN=${RUN:-runs/gta5_eva02_l}

# Data. What is already made is left alone.
for name in gta5 cityscapes bdd100k mapillary; do
    [ -f "$DATA/$name/manifest.json" ] || python "dataset_scripts/prepare_$name.py" "$RAW/$name" "$DATA/$name"
done

# Start. EVA02-CLIP of open_clip, downloaded.
[ -d "$START" ] || python convert_checkpoint.py EVA02-L-14-336:merged2b_s6b_b61k "$START" \
    --init eva02_clip_l14 --from open_clip --seed 2023

# Training.
# As published where our defaults are otherwise: whole pictures are resized with OpenCV's rounding, and every process
# divides its losses by its own counts. (The frozen tower would drop paths, too, but this one has a rate of 0.)
accelerate launch ${LAUNCH:-} train.py \
    --model "$START" --data "$DATA/gta5" --eval-data "$DATA/cityscapes" --eval-box 1024 2048 \
    --out "$RUN" --seed 2023 --save-every 2000 --eval-every 2000 --workers 4 \
    --steps 20000 --batch-size 8 --crop 512 --warmup-steps 1500 \
    --lr 1e-5 --vision-lr-mult 0.1 \
    --resize whole --loss-counts published "$@"

# Test, of the last model; best/ was chosen by Cityscapes, which is a test set here. A dry run leaves none.
[ -d "$RUN/model" ] || exit 0
python evaluate_tqdm.py "$RUN/model" --protocol published --out "$RUN/test" \
    --data cityscapes="$DATA/cityscapes" bdd100k="$DATA/bdd100k" mapillary="$DATA/mapillary"
