"""Options of the programs that prepare, check and audit datasets."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..program import names, option

# Those that this process may use: a job on a cluster, or under taskset, is given a part.
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MOST_WORKERS = 1024
OffRoadMap = Literal["names", "words", "trail_only", "with_grass"]
_OFF_ROAD_HELP = (
    "names: the dataset's classes (default); words: those that have a class vector, obstacle, pole and container are "
    "ignored; trail_only: traversable are trails and other bare or hard ground; "
    "with_grass: grass, too. Sets under different decisions are refused together"
)


def check_workers(number: int, least: int) -> None:
    """Raises ValueError for numbers of processes that no machine runs."""
    if not least <= number <= MOST_WORKERS:
        raise ValueError(f"--workers {number} must be {least} to {MOST_WORKERS}")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What every dataset's program takes."""

    root: Path = option(help="folder with the images, as described above")
    out: Path = option(flag=True, help="dataset folder to make; DIR.partial until it is whole")
    workers: int = option(CPUS, group="work", help="processes")
    overwrite: bool = option(False, group="work", help="replace a DIR made from other files or options")
    skip_bad: bool = option(
        False,
        group="work",
        help="leave out frames that are broken, unlabelled or whose label has another size, and list them in the "
        "manifest (default: stop at the first)",
    )
    rows_per_shard: int = option(128, group="what is stored", help="frames per Parquet file")
    link: bool = option(
        False,
        group="what is stored",
        help="store paths of the images instead of their bytes: small shards, for this machine only",
    )
    jpeg: int | None = option(
        None,
        group="what is stored",
        metavar="QUALITY",
        help="re-encode images that are not JPEG, 1 to 95: smaller, but not the original (default: off)",
    )

    def __post_init__(self):
        check_workers(self.workers, 1)
        if self.rows_per_shard < 1:
            raise ValueError(f"--rows-per-shard {self.rows_per_shard} must be 1 or more")
        if not (self.jpeg is None or 1 <= self.jpeg <= 95):
            raise ValueError(f"--jpeg {self.jpeg} is not between 1 and 95")
        if self.link and self.jpeg is not None:
            raise ValueError("--link stores no images, so --jpeg cannot re-encode them; give one of the two")


@dataclass(frozen=True, kw_only=True)
class AcdcOptions(PrepareOptions):
    """ACDC (fog, night, rain, snow) to shards: train and val. The test part has no labels; *_ref are not used.

    ROOT/rgb_anon/fog/train/GOPR0475/GOPR0475_frame_000041_rgb_anon.png      rgb_anon_trainvaltest.zip
    ROOT/gt/fog/train/GOPR0475/GOPR0475_frame_000041_gt_labelTrainIds.png    gt_trainval.zip
    """


@dataclass(frozen=True, kw_only=True)
class Bdd100kOptions(PrepareOptions):
    """BDD100K, its 10k part with semantic labels, to shards: train and val. The test part has no labels.

    ROOT/images/10k/train/<id>.jpg       or, in the older release,   ROOT/seg/images/train/<id>.jpg
    ROOT/labels/sem_seg/masks/train/<id>.png                         ROOT/seg/labels/train/<id>_train_id.png

    ROOT may also be the folder that holds bdd100k/.
    """


@dataclass(frozen=True, kw_only=True)
class CityscapesOptions(PrepareOptions):
    """Cityscapes (fine annotations) to shards: train and val. gtFine/test holds dummy labels and is left out.

    ROOT/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png     leftImg8bit_trainvaltest.zip
    ROOT/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png      gtFine_trainvaltest.zip
    """


@dataclass(frozen=True, kw_only=True)
class FolderOptions(PrepareOptions):
    """Your own images and masks to shards.

    Every image ROOT/a/b.jpg has the mask MASKS/a/b.png (see --mask-suffix). First-level folders called train, val,
    test or the like (val2017, Testing_B) become splits; without them all is train. Where MASKS is ROOT, masks lie in a
    folder next to that of the images: train/images and train/masks, RELLIS-3D's pylon_camera_node and
    pylon_camera_node_label_id (see --folders). FILE names one class per line, in the order of the new ids:

        road                     the next id; masks are 8-bit PNGs (grey or palette) of 0, 1, ..., 255 ignored
        road,7                   masks hold other ids: this class is stored as 7
        road,128,64,128          masks hold colours: this class has this one

    Semicolons or tabs, a header, #RRGGBB, and the lists of RUGD, CamVid and CVAT do as well. A name may come twice,
    with a second id or colour. The name "ignored" takes what is not to be learned. Masks may be PNG, TIFF or BMP.
    """

    masks: Path = option(help="folder with the masks, as described above")
    class_file: Path = option(flag=True, help="class names, as described above")
    mask_suffix: str = option(
        ".png", help="end of the masks' names; where there is none of that name, .tif, .tiff and .bmp are tried"
    )
    tolerance: int = option(
        0,
        metavar="N",
        help="values or colours that the class file does not name count as the nearest one that differs by at most N "
        "(in each channel), as at the smoothed edges of some masks; their number is stated (default: 0, an error)",
    )
    name: str = option("Own images", help="name of the dataset on its card")
    license: str = option("unknown", help="licence named on the card")
    pairs: tuple[Path, ...] = option(
        (),
        group="which frames",
        metavar="LIST",
        help="text files of pairs instead of all images: image,mask[,split[,scene]] per line, paths under ROOT and "
        "MASKS; without a split it is that in the list's name (val.lst), else train",
    )
    folders: tuple[str, ...] = option(
        (),
        group="which frames",
        type=names,
        metavar="IMAGES,MASKS",
        help="names of folders of images and of masks next to each other, where MASKS is ROOT (default: known ones)",
    )
    hold_out: float | None = option(
        None,
        group="which frames",
        metavar="SHARE",
        help="make a validation split of this share of train, such as 0.15: whole scenes where there are several",
    )
    seed: int = option(0, group="which frames", help="of the choice for --hold-out")
    hold_out_scenes: Path | None = option(
        None,
        group="which frames",
        metavar="FILE",
        help="make a validation split of the scenes or images that this file names, one per line",
    )

    scene: str | None = option(
        None,
        group="which frames",
        metavar="REGEX",
        help="the scene of a frame is what this finds in its path under ROOT, without suffix, or its first group: "
        "'(.+)_' makes trail-3 of trail-3_02001 (default: the folder)",
    )
    scene_seconds: int | None = option(
        None,
        group="which frames",
        metavar="N",
        help="cut drives whose frames are named by milliseconds (13 digits) into scenes of N seconds, for intervals "
        "within one drive",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.scene_seconds is not None and self.scene_seconds < 1:
            raise ValueError(f"--scene-seconds {self.scene_seconds} must be 1 or more")
        try:
            re.compile(self.scene or "")
        except re.error as error:
            raise ValueError(f"--scene {self.scene} is no regular expression ({error})") from error
        if not 0 <= self.tolerance <= 255:
            raise ValueError(f"--tolerance {self.tolerance} is not between 0 and 255")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must be 0 or more")
        if self.hold_out is not None and not 0 < self.hold_out < 1:
            raise ValueError(f"--hold-out {self.hold_out:g} is not between 0 and 1, such as 0.15")
        if self.hold_out is not None and self.hold_out_scenes is not None:
            raise ValueError("--hold-out chooses by chance, --hold-out-scenes by a list; give one of the two")
        if self.folders and len(self.folders) != 2:
            raise ValueError("--folders takes two names, such as images,masks")
        if self.pairs and self.folders:
            raise ValueError("--pairs names the files, so --folders has nothing to do; give one of the two")


@dataclass(frozen=True, kw_only=True)
class Gta5Options(PrepareOptions):
    """GTA5 (Playing for Data) to shards.

    ROOT/images/00001.png                the ten image archives, unpacked into one folder,
    ROOT/labels/00001.png                and the ten label archives
    ROOT/images/{train,valid,test}/...   or divided into sub-folders of the same names on both sides
    ROOT/split.mat                       with --splits official: the list from the download page
    """

    splits: Literal["robustnet", "official"] = option(
        "robustnet",
        help="robustnet: the lists that TLDR and tqdm use, without 15 single-colour frames (default); official: "
        "ROOT/split.mat",
    )


@dataclass(frozen=True, kw_only=True)
class MapillaryOptions(PrepareOptions):
    """Mapillary Vistas (v1.2 labels) to shards: training and validation. The testing part has no labels.

    ROOT/training/images/<id>.jpg
    ROOT/training/v1.2/labels/<id>.png   (newer package)   or   ROOT/training/labels/<id>.png   (v1.2 package)

    Two maps from its 66 ids to the 19 classes are in use, and results under one cannot be compared with the other's.
    The manifest records the map, and datasets prepared under different ones are refused together.
    """

    map: Literal["robustnet", "openseg"] = option(
        "robustnet",
        help="robustnet: used by RobustNet, TLDR, tqdm, DAFormer, HRDA (default); openseg: used by Rein and followers",
    )


@dataclass(frozen=True, kw_only=True)
class OrfdOptions(PrepareOptions):
    """ORFD (Off-Road Freespace Detection) to shards.

    ROOT/training/<scene>/image_data/<frame>.png             and validation/, testing/
    ROOT/training/<scene>/gt_image/<frame>_fillcolor.png
    ROOT/training/{image_data,gt_image}/...                  or without the scene level: scenes are then unknown

    ROOT may also be the folder that holds Final_Dataset/.
    """

    unreachable: Literal["merged", "ignored"] = option(
        "merged",
        help="the grey part of the labels (sky): merged into non-traversable as published (default), or ignored",
    )


@dataclass(frozen=True, kw_only=True)
class Road3dOptions(OrfdOptions):
    """Road3D, the local name of ORAD-3D, to shards. Its folders are those of ORFD.

    ROOT/testing/<scene>/image_data/<frame>.png              and training/, validation/
    ROOT/testing/<scene>/gt_image/<frame>_fillcolor.png

    A further folder around that of a scene, as some of its archives have, is allowed. The labels are road or not
    (`gt_image`); `gt_image_multi_seg` is not read.
    """


@dataclass(frozen=True, kw_only=True)
class RugdOptions(PrepareOptions):
    """RUGD (Robot Unstructured Ground Driving) to shards. All frames are test; the scene is the name's beginning.

    ROOT/RUGD_frames-with-annotations/creek/creek_00001.png    RGB
    ROOT/RUGD_annotations/creek/creek_00001.png                colours of RUGD_annotation-colormap.txt
    ROOT/images/creek_00001.png, ROOT/annotations/...          the sample download: the same without folders of scenes
    ROOT/test/images/creek_00001.jpg, ROOT/test/masks/...      8-bit PNGs of the ids 1 to 24, 0 void

    No licence was found: measure on it, keep the folder and every image from it private.
    """

    map: OffRoadMap = option("names", help=_OFF_ROAD_HELP)


@dataclass(frozen=True, kw_only=True)
class SynthiaOptions(PrepareOptions):
    """SYNTHIA-RAND-CITYSCAPES to shards.

    ROOT/RGB/0000000.png          and the same names in   ROOT/GT/LABELS/   (16-bit, red = class id)
    ROOT/RGB/{train,val}/...      or divided into sub-folders of the same names on both sides

    ROOT may also be the folder that holds RAND_CITYSCAPES/.
    """

    splits: Literal["robustnet", "none"] = option(
        "robustnet", help="robustnet: its lists of 6,580 and 2,820 (default); none: all frames are train"
    )


@dataclass(frozen=True, kw_only=True)
class YcorOptions(PrepareOptions):
    """YCOR (Yamaha-CMU Off-Road) to shards. train without its last frames, these as validation, valid as test.

    ROOT/train/iid000000/rgb.jpg        and valid/; ROOT may also be the folder that holds yamaha_v0/
    ROOT/train/iid000000/labels.png     palette PNG of nine colours, white is background and ignored
    ROOT/train/images/0000.jpg          or plain: ROOT/train/masks/0000.png holds the ids 0 to 7, 255 ignored

    The last 94 of its 931 training frames in file order show another place (8 % trail instead of 34 %): held back,
    they say when a training on the others stops gaining.
    No licence was found: measure on it, keep the folder and every image from it private.
    """

    map: OffRoadMap = option("names", help=_OFF_ROAD_HELP)
    hold_out_last: int = option(
        94, metavar="N", help="training frames, last in file order, that become validation (default: %(default)s)"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.hold_out_last < 0:
            raise ValueError(f"--hold-out-last {self.hold_out_last} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Verifies that prepared datasets, in folders or at URLs, are what their manifests say.

    Checks sizes and checksums of all files, every row against the index, that labels hold classes only, and their
    counts. With several folders also that their labels may be used together: the same classes, and not two maps of one
    kind. Exit status 1, and the first bad row of every bad shard, if not.
    """

    folders: tuple[str, ...] = option(
        nargs="+",
        metavar="FOLDER",
        help="folders that `prepare` made, or URLs (hf://datasets/..., https://...)",
    )
    workers: int = option(CPUS, help="processes")

    def __post_init__(self):
        check_workers(self.workers, 1)


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Finds scenes, frames and images that two sets have in common: test frames that were trained on.

    Each set is one of
        a text file    one name per line: scenes (x0613_1627), or frames by file name or path (00001.png)
        a folder       with images in it or below, as ORFD/training; where there are image_data folders, only those
                       count
        a shard folder that `prepare` made; FOLDER:SPLIT is one split of it

    Scenes of a folder are the folders that are named after a recording time or hold image_data. Folders must hold
    images without their labels. Exit status: 0 nothing found, 3 leaks found, 1 bad input, also when images could not
    be read (the others are compared). The order of the sets, and of the names in them, makes no difference.
    """

    first: str = option(help="text file, folder, shard folder or FOLDER:SPLIT")
    second: str = option(help="the same")
    minutes: float | None = option(
        None, metavar="N", help="also report recordings and stamped frames at most N minutes apart"
    )
    distance: int = option(
        4,
        metavar="BITS",
        help="images are near-duplicates up to this many different bits of 64 (default: %(default)s). Measured on one "
        "drive: re-encoded images 0 to 4, frames half a second apart 0 to 22, 12 seconds and more 12 to 42",
    )
    images: bool = option(True, help="compare images (default), or only names, which takes no time")
    json: Path | None = option(None, help="write everything that was found")
    csv: Path | None = option(None, help="the same as a table")

    def __post_init__(self):
        if self.minutes is not None and self.minutes < 0:
            raise ValueError(f"--minutes {self.minutes:g} must be 0 or more")
        if not 0 <= self.distance < 32:
            raise ValueError(f"--distance {self.distance} is not between 0 and 31")
