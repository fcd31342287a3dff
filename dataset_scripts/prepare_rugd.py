"""RUGD to shards: `tqdm-seg prepare rugd`, here for a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tqdm_seg.commands import start

if __name__ == "__main__":
    sys.exit(start("prepare rugd"))
