"""E1: YCOR -> RUGD and ORFD, traversable or not

Setting   trained on YCOR's first 837 frames, its last 94 (another place) held back; tested on RUGD (another country and
          robot, 18 scenes) and on one snowy ORFD drive (blocks of 4 seconds within one drive). Traversable are trails;
          the second command counts grass, too. All rows of the ablation and of class texts, three seeds
Chosen    the steps of every run, by the held-back part; nothing else, and nothing by a test set
Data      YCOR and RUGD may be measured on, not passed on: no frame of them and no weights from them leave the machine
Cost      27 and 3 runs of 400 steps; the time is not measured
Figures   models: not measured. Baselines, mIoU in percent, trail only, on the held-back part, RUGD and ORFD:
          constant answer 45.9, 38.9, 37.9; location mask 48.6, 53.2, 61.5; colour classifier 50.6, 52.9, 36.2
Audit     no leak between YCOR, RUGD and ORFD; 4 of YCOR's training frames look like 5 of its held-back ones (1171 to
          1176), so the held-back part is not wholly another place
"""

import sys

from experiment import DATA, SEEDS, main, orfd, rugd, ycor

PARTS = "full,no-text-attention,random-queries,no-textual,no-visual,no-score-map"
TEXTS = "real-texts,random-texts,cosine-head"  # traversable has the vector of "road", non-traversable of "plant-other"
TRAINING = ["--steps", "400", "--eval-every-steps", "100", *SEEDS]


def ablation(choice: str, out: str, *more: str) -> list[str]:
    """Trains on YCOR under one decision on what is traversable, tests on the others."""
    tests = [f"rugd={DATA / f'rugd_{choice}'}:test", f"orfd={DATA / 'orfd_224'}:test"]
    return ["--data", str(DATA / f"ycor_{choice}"), "--test", *tests, *TRAINING, *more, "--out", out]


PREPARATION = [command(choice) for choice in ("trail_only", "with_grass") for command in (ycor, rugd)] + [orfd()]
ABLATIONS = [
    ablation("trail_only", "runs/e1_trail_only", "--variants", f"{PARTS},{TEXTS}"),
    ablation("with_grass", "runs/e1_with_grass", "--variants", "full"),
]

if __name__ == "__main__":
    sys.exit(main(PREPARATION, ABLATIONS, sys.argv[1:]))
