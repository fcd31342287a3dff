"""E1b: ORFD -> YCOR and RUGD, traversable or not

Setting   trained on the first 36 seconds of one snowy ORFD drive, its last 11 held back; tested on YCOR's frames (no
          scenes: intervals over seeds alone) and on RUGD's 18 scenes. Traversable are trails. Three seeds
Chosen    the steps of every run, by the held-back part; nothing else, and nothing by a test set
Data      ORFD is Apache-2.0: weights from it may be passed on. Frames of YCOR and RUGD may not
Cost      3 runs of 400 steps; the time is not measured
Figures   not measured
"""

import sys

from experiment import DATA, HERE, SEEDS, main, orfd, rugd, ycor

HELD_BACK = ["--hold-out-scenes", str(HERE / "orfd_held_back.txt")]
ORFD = orfd(*HELD_BACK, parts=("test/images", "test/masks"), name="orfd_224_split")
PREPARATION = [ORFD, ycor("trail_only"), rugd("trail_only")]
TESTS = [f"ycor={DATA / 'ycor_trail_only'}:train", f"rugd={DATA / 'rugd_trail_only'}:test"]
ABLATIONS = [
    ["--data", str(DATA / "orfd_224_split"), "--test", *TESTS, "--steps", "400", "--eval-every-steps", "100", *SEEDS,
     "--variants", "full", "--out", "runs/e1b"],
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(PREPARATION, ABLATIONS, sys.argv[1:]))
