#!/usr/bin/env bash
# ORFD -> Road3D (ORAD-3D) with CLIP ViT-B/16: 26 test scenes, three of which the model has seen
#
# Setting   the model of orfd_clip_vit_b.sh, trained on ORFD's 21 training scenes, tested on Road3D's 26 test scenes
#           (11,098 frames), as in the published comparison; Road3D's own training part is not used.
#           x0613_1627, x2021_0223_1310 and y0613_1248 are in both lists, so their frames test nothing: `tqdm-seg audit`
#           finds them, and the 23 other scenes also get a figure of their own
# Data      ORFD        as in orfd_clip_vit_b.sh
#           Road3D      tqdm-seg prepare road3d, from the testing part of ORAD-3D, one archive per scene
# Cost      that of orfd_clip_vit_b.sh, nothing if its model exists; hours of the test: not measured
# Expected  no published figure of this recipe. Other methods, trained on ORFD, in the published Road3D table: OFF-Net
#           85.57 (quarter-size ground truth), OT-Drive 89.74 (full size; with surface normals and scene texts)
# Ours      not measured
#
# Downloads are expected unpacked in $RAW, one folder per dataset (steps.bash). Further options go to training.
#   bash recipes/road3d_clip_vit_b.sh --dry-run
#   bash recipes/road3d_clip_vit_b.sh
#   RUN=runs/frozen bash recipes/road3d_clip_vit_b.sh --vision frozen
set -euo pipefail
. "$(dirname "$0")/steps.bash"
export RAW DATA RUN=${RUN:-runs/orfd_clip_vit_b}

# Training, unless there is a model.
[ -d "$RUN/model" ] || bash "$(dirname "$0")/orfd_clip_vit_b.sh" "$@"
unless "$DATA/road3d/manifest.json" tqdm-seg prepare road3d "$RAW/road3d" --out "$DATA/road3d"
trained || exit 0

# Audit. Exit status 3 says that leaks were found; which scenes becomes an attribute of every test scene.
tqdm-seg audit "$DATA/road3d:test" "$DATA/orfd:train" --no-images --csv "$RUN/leaks.csv" || [ $? -eq 3 ]
echo scene,seen > "$RUN/seen.csv"
while read -r scene; do
    if grep -q "^same scene,$scene," "$RUN/leaks.csv"; then seen=yes; else seen=no; fi
    echo "$scene,$seen" >> "$RUN/seen.csv"
done < "$lists/scenes/road3d_test_scenes.txt"

# Test, at the images' own 1280x720. road3d_groups.csv has the unseen scenes under "seen", "no".
tqdm-seg evaluate "$RUN/model" --data road3d="$DATA/road3d:test" --out "$RUN/road3d" \
    --attributes "$RUN/seen.csv" --by seen
