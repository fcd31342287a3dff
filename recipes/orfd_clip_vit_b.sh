#!/usr/bin/env bash
# ORFD -> ORFD with CLIP ViT-B/16: two classes, off the road
#
# Setting   trained on ORFD's training part (21 scenes), tested on its testing part (6 other scenes); the classes are
#           non-traversable, which includes the sky, and traversable. The authors' repository has no off-road setting:
#           this is its recipe for GTA5 on other data
# Data      ORFD        tqdm-seg prepare orfd, from the official download, whose folders have a level of scenes
# Cost      20,000 steps of 8 images of 512x512 per process. The launch command sets the number of processes, as in the
#           published files (the paper speaks of 16 images a step: two processes); without LAUNCH it is one per GPU.
#           GPUs and hours: not measured. Memory: --dry-run tells.
# Expected  no published figure of this model on ORFD is known here
# Ours      not measured
#
# Downloads are expected unpacked in $RAW, one folder per dataset (steps.bash). Further options go to training.
#   bash recipes/orfd_clip_vit_b.sh --dry-run
#   bash recipes/orfd_clip_vit_b.sh
#   bash recipes/orfd_clip_vit_b.sh --resume
#   LAUNCH="--config_file recipes/accelerate/ddp.yaml" DATA=/disk/data bash recipes/orfd_clip_vit_b.sh --workers 8
# Cheaper, but not the published setting, and not measured:
#   RUN=runs/frozen bash recipes/orfd_clip_vit_b.sh --vision frozen
#   RUN=runs/lora bash recipes/orfd_clip_vit_b.sh --vision lora --vision-lr-mult 10
#   RUN=runs/less_memory bash recipes/orfd_clip_vit_b.sh --gradient-checkpointing
#   RUN=runs/bf16 bash recipes/orfd_clip_vit_b.sh --precision bf16
set -euo pipefail
. "$(dirname "$0")/steps.bash"
START=${START:-models/clip_vit_b16} RUN=${RUN:-runs/orfd_clip_vit_b}

# Data.
unless "$DATA/orfd/manifest.json" tqdm-seg prepare orfd "$RAW/orfd" --out "$DATA/orfd"

# Start model: OpenAI's CLIP, downloaded. (OpenAI's own file: ViT-B-16.pt, without --from.)
unless "$START" tqdm-seg convert openai/clip-vit-base-patch16 --out "$START" \
    --init clip_vit_b16 --from transformers --seed 2023

# Training. The two classes are those of the data; best/ is chosen by ORFD's validation part.
# Published behaviour that is not our default: the teacher drops paths at random, whole images are resized with OpenCV's
# rounding, and every process divides its losses by its own counts.
accelerate launch ${LAUNCH:-} -m tqdm_seg.train \
    --model "$START" --data "$DATA/orfd" \
    --out "$RUN" --seed 2023 --save-every-steps 2000 --eval-every-steps 2000 --workers 4 \
    --steps 20000 --batch-size 8 --crop 512 --warmup-steps 1500 \
    --lr 1e-5 --vision-lr-mult 0.1 \
    --teacher-drop-path --resize whole --loss-counts published \
    $(stand_in clip_vit_b16) "$@"

# Test, at the images' own 1280x720.
trained || exit 0
tqdm-seg evaluate "$RUN/model" --data orfd="$DATA/orfd:test" --out "$RUN/test"
