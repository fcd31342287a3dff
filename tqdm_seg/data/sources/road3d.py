"""Road3D, the local name of ORAD-3D, to shards. Its folders are those of ORFD.

    python dataset_scripts/prepare_road3d.py ROOT OUT

    ROOT/testing/<scene>/image_data/<frame>.png              and training/, validation/
    ROOT/testing/<scene>/gt_image/<frame>_fillcolor.png

A further folder around that of a scene, as some of its archives have, does no harm. The labels are road or not
(`gt_image`); `gt_image_multi_seg` is not read.
"""

from typing import Any

from ..files import run
from ..prepare import Source
from .orfd import orfd_parser, prepare_orfd

SOURCE = Source(
    "Road3D (ORAD-3D)",
    "ORAD-3D by the authors of ORFD; see its repository for the terms before passing this folder on.",
    published={"test": (11098,)},
)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prepares the dataset; returns its manifest."""
    return prepare_orfd(orfd_parser(__doc__).parse_args(argv), SOURCE)


if __name__ == "__main__":
    run(main)
