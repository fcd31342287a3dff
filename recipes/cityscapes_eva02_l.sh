#!/usr/bin/env bash
# Cityscapes -> BDD100K, Mapillary Vistas with EVA02-CLIP-L/14-336
#
# Setting   trained on Cityscapes alone (2,975 frames, fine labels),
#           tested on the validation parts of BDD100K (1,000 frames) and Mapillary Vistas (2,000)
# Data      Cityscapes  prepare_cityscapes.py, from leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip
#           BDD100K     prepare_bdd100k.py, from pictures and semantic masks of its 10k part
#           Mapillary   prepare_mapillary.py, from Vistas with its v1.2 labels (map: robustnet, as published)
# Bill      20,000 steps of 8 pictures of 512x512 per process. How many processes is left to the launch command, here as
#           in the published files (the paper's text speaks of 16 pictures a step: two); without LAUNCH it is one for
#           each GPU of the machine. GPUs and hours: not measured. Memory: --dry-run tells.
# Expected  the figure of the tables of arXiv 2407.09033, which was not at hand here
# Ours      not measured yet
#
# Downloads are expected in $RAW, each in a folder of its own, unpacked. Further options go to train.py.
#   bash recipes/cityscapes_eva02_l.sh
#   bash recipes/cityscapes_eva02_l.sh --resume
#   LAUNCH="--config_file recipes/accelerate/ddp.yaml" DATA=/disk/data bash recipes/cityscapes_eva02_l.sh --workers 8
# Cheaper, but no longer the published setting, and not measured:
#   RUN=runs/frozen bash recipes/cityscapes_eva02_l.sh --vision frozen
#   RUN=runs/lora bash recipes/cityscapes_eva02_l.sh --vision lora --vision-lr-mult 1
#   RUN=runs/less_memory bash recipes/cityscapes_eva02_l.sh --gradient-checkpointing
#   RUN=runs/bf16 bash recipes/cityscapes_eva02_l.sh --mixed-precision bf16
set -euo pipefail
cd "$(dirname "$0")/.."
RAW=${RAW:-downloads} DATA=${DATA:-data} START=${START:-models/eva02_clip_l14} RUN=${RUN:-runs/cityscapes_eva02_l}

# Data. What is already made is left alone.
for name in cityscapes bdd100k mapillary; do
    [ -f "$DATA/$name/manifest.json" ] || python "dataset_scripts/prepare_$name.py" "$RAW/$name" "$DATA/$name"
done

# Start. EVA02-CLIP of open_clip, downloaded.
[ -d "$START" ] || python convert_checkpoint.py EVA02-L-14-336:merged2b_s6b_b61k "$START" \
    --init eva02_clip_l14 --from open_clip --seed 2023

# Training.
# As published where our defaults are otherwise: whole pictures are resized with OpenCV's rounding, and every process
# divides its losses by its own counts. (The frozen tower would drop paths, too, but this one has a rate of 0.)
accelerate launch ${LAUNCH:-} train.py \
    --model "$START" --data "$DATA/cityscapes" --eval-box 1024 2048 \
    --out "$RUN" --seed 2023 --save-every 2000 --eval-every 2000 --workers 4 \
    --steps 20000 --batch-size 8 --crop 512 --warmup-steps 1500 \
    --lr 1e-4 --vision-lr-mult 0.1 --weight-decay 1e-5 --no-embedding-decay \
    --resize whole --loss-counts published "$@"

# Test, of the last model. A dry run leaves none.
[ -d "$RUN/model" ] || exit 0
python evaluate_tqdm.py "$RUN/model" --protocol published --out "$RUN/test" \
    --data bdd100k="$DATA/bdd100k" mapillary="$DATA/mapillary"
