#!/usr/bin/env bash
# ORFD -> Road3D (ORAD-3D) with CLIP ViT-B/16: 26 test scenes, three of which the model has seen
#
# Setting   the model of orfd_clip_vit_b.sh, trained on ORFD's 21 training scenes, tested on Road3D's 26 test scenes
#           (11,098 frames), as in the published comparison; Road3D's own training part is not used.
#           x0613_1627, x2021_0223_1310 and y0613_1248 are in both lists, so their frames test nothing: audit_splits.py
#           finds them, and the 23 other scenes also get a figure of their own
# Data      ORFD        as in orfd_clip_vit_b.sh
#           Road3D      prepare_road3d.py, from the testing part of ORAD-3D, one archive per scene
# Bill      that of orfd_clip_vit_b.sh, nothing if its model is there; hours of the test: not measured
# Expected  nothing was published for this recipe: the published comparison is of runs with another one
# Ours      not measured yet
#
# Downloads are expected in $RAW, each in a folder of its own, unpacked. Further options go to train.py.
#   bash recipes/road3d_clip_vit_b.sh
#   RUN=runs/frozen bash recipes/road3d_clip_vit_b.sh --vision frozen
set -euo pipefail
cd "$(dirname "$0")/.."
export RAW=${RAW:-downloads} DATA=${DATA:-data} RUN=${RUN:-runs/orfd_clip_vit_b}

# Training, unless it is done. A dry run leaves no model.
[ -d "$RUN/model" ] || bash recipes/orfd_clip_vit_b.sh "$@"
[ -d "$RUN/model" ] || exit 0

# Data. What is already made is left alone.
[ -f "$DATA/road3d/manifest.json" ] || python dataset_scripts/prepare_road3d.py "$RAW/road3d" "$DATA/road3d"

# Audit. Its exit status 1 says that scenes were found; which ones becomes a property of every test scene.
python dataset_scripts/audit_splits.py "$DATA/road3d:test" "$DATA/orfd:train" --no-pictures --csv "$RUN/leaks.csv" ||
    [ $? -eq 1 ]
echo scene,seen > "$RUN/seen.csv"
while read -r scene; do
    if grep -q "^same scene,$scene," "$RUN/leaks.csv"; then seen=yes; else seen=no; fi
    echo "$scene,$seen" >> "$RUN/seen.csv"
done < dataset_scripts/scene_lists/road3d_test_scenes.txt

# Test, at the pictures' own 1280x720. road3d_groups.csv has the unseen scenes under "seen", "no".
python evaluate_tqdm.py "$RUN/model" --data road3d="$DATA/road3d:test" --out "$RUN/road3d" \
    --attributes "$RUN/seen.csv" --by seen
