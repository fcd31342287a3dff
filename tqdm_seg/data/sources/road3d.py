"""Road3D (ORAD-3D) to shards: `tqdm-seg prepare road3d`."""

import sys

from ...commands import start

if __name__ == "__main__":
    sys.exit(start("prepare road3d"))


from typing import Any

from ...program import takes
from ..options import Road3dOptions
from ..prepare import Source
from .orfd import make_orfd_dataset

SOURCE = Source(
    "Road3D (ORAD-3D)",
    "ORAD-3D by the authors of ORFD; see its repository for the terms before passing this folder on.",
    published={"test": (11098,)},
)


@takes(Road3dOptions)
def prepare_road3d(options: Road3dOptions) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    return make_orfd_dataset(options, SOURCE)
