"""E2: YCOR's names -> RUGD's names, an open class list

Setting   trained on seven of YCOR's eight names (obstacle has no word), tested under 22 of RUGD's 24 (pole and
          container have none). The texts are vectors of CLIP ViT-B/16, centred; the class head compares with them, so
          that RUGD's names need no training. Random vectors instead of the texts say what language is worth; further
          rows leave out a part each. Baselines answer in YCOR's names, and in RUGD's where these have the same word
Chosen    the steps of every run, by the held-back part; nothing else, and nothing by a test set
Mean      over the names that lie in at least three of RUGD's 18 scenes; the others are named
Data      YCOR and RUGD may be measured on, not passed on: no frame of them and no weights from them leave the machine
Cost      21 runs of 400 steps; the time is not measured
Figures   not measured
"""

import sys

from experiment import DATA, SEEDS, main, rugd, ycor

PREPARATION = [ycor("words"), rugd("words")]
TEXTS = ["--class-vectors", "clip_vit_b16", "--centre-class-vectors", "--class-head", "cosine"]
VARIANTS = "full,random-texts,raw-texts,no-text-attention,no-textual,no-visual,no-score-map"
ABLATIONS = [
    ["--data", str(DATA / "ycor_words"), "--test", f"rugd={DATA / 'rugd_words'}:test", *TEXTS, "--steps", "400",
     "--eval-every-steps", "100", *SEEDS, "--variants", VARIANTS, "--out", "runs/e2"],
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(PREPARATION, ABLATIONS, sys.argv[1:]))
