#!/usr/bin/env bash
# SYNTHIA -> Cityscapes, BDD100K, Mapillary Vistas with EVA02-CLIP-L/14-336
#
# Setting   trained on SYNTHIA-RAND-CITYSCAPES alone (RobustNet's training list),
#           tested on the validation parts of Cityscapes (500 frames), BDD100K (1,000) and Mapillary Vistas (2,000)
#           terrain, truck and train do not occur in SYNTHIA: the mean is taken over the other 16 classes
# Data      SYNTHIA     tqdm-seg prepare synthia, from SYNTHIA-RAND-CITYSCAPES
#           Cityscapes  tqdm-seg prepare cityscapes, from leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip
#           BDD100K     tqdm-seg prepare bdd100k, from images and semantic masks of its 10k part
#           Mapillary   tqdm-seg prepare mapillary, from Vistas with its v1.2 labels (map: robustnet, as published)
# Cost      20,000 steps of 8 images of 512x512 per process. The launch command sets the number of processes, as in the
#           published files (the paper speaks of 16 images a step: two processes); without LAUNCH it is one per GPU.
#           GPUs and hours: not measured. Memory: --dry-run tells.
# Expected  no published figure of this setting is known here
# Ours      not measured
#
# Downloads are expected unpacked in $RAW, one folder per dataset (steps.bash). Further options go to training.
#   bash recipes/synthia_eva02_l.sh --dry-run
#   bash recipes/synthia_eva02_l.sh
#   bash recipes/synthia_eva02_l.sh --resume
#   LAUNCH="--config_file recipes/accelerate/ddp.yaml" DATA=/disk/data bash recipes/synthia_eva02_l.sh --workers 8
# Cheaper, but not the published setting, and not measured:
#   RUN=runs/frozen bash recipes/synthia_eva02_l.sh --vision frozen
#   RUN=runs/lora bash recipes/synthia_eva02_l.sh --vision lora --vision-lr-mult 10
#   RUN=runs/less_memory bash recipes/synthia_eva02_l.sh --gradient-checkpointing
#   RUN=runs/bf16 bash recipes/synthia_eva02_l.sh --precision bf16
set -euo pipefail
. "$(dirname "$0")/steps.bash"
START=${START:-models/eva02_clip_l14} RUN=${RUN:-runs/synthia_eva02_l}

# Data.
for name in synthia cityscapes bdd100k mapillary; do
    unless "$DATA/$name/manifest.json" tqdm-seg prepare "$name" "$RAW/$name" --out "$DATA/$name"
done

# Start model: EVA02-CLIP of open_clip, downloaded.
unless "$START" tqdm-seg convert EVA02-L-14-336:merged2b_s6b_b61k --out "$START" \
    --init eva02_clip_l14 --from open_clip --seed 2023

# Training.
# Published behaviour that is not our default: whole images are resized with OpenCV's rounding, and every process
# divides its losses by its own counts. (The published teacher drops paths, too, but this tower has a rate of 0.)
accelerate launch ${LAUNCH:-} -m tqdm_seg.train \
    --model "$START" --data "$DATA/synthia" --eval-data "$DATA/cityscapes" --eval-size 1024x2048 \
    --class-set synthia-16 \
    --out "$RUN" --seed 2023 --save-every-steps 2000 --eval-every-steps 2000 --workers 4 \
    --steps 20000 --batch-size 8 --crop 512 --warmup-steps 1500 \
    --lr 1e-5 --vision-lr-mult 0.1 \
    --resize whole --loss-counts published \
    $(stand_in eva02_clip_l14) "$@"

# Test, of the last model; best/ was chosen by Cityscapes, which is a test set here.
trained || exit 0
tqdm-seg evaluate "$RUN/model" --protocol published --out "$RUN/test" --class-set synthia-16 \
    --data cityscapes="$DATA/cityscapes" bdd100k="$DATA/bdd100k" mapillary="$DATA/mapillary"
