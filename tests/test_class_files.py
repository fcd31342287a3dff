"""Class files of every common form give the right names, ids and colours, or an error that names file and line."""

from pathlib import Path

import numpy as np
import pytest
from shard_helpers import prepare, save, stored
from test_prepare import folder

from tqdm_seg.data.class_files import read_classes
from tqdm_seg.data.label_maps import LabelMap

RUGD = "0 void 0 0 0\n1 dirt 108 64 20\n2 picnic-table 220 20 60\n"
CVAT = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\n"


def classes_of(tmp_path: Path, content: str | bytes, **kwargs) -> LabelMap:
    path = tmp_path / "classes.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_classes(path, **kwargs)


def meaning(label_map: LabelMap) -> dict[int, str]:
    """Class name of every stored value."""
    return {value: "ignored" if id == 255 else label_map.classes[id] for value, id in label_map.table}


IDS = [
    "road;7\nmud;3\n", "road\t7\nmud\t3", "road, 7\r\nmud , 3\r\n", "name;id\nroad;7\nmud;3",
    "ID,Class\n7,road\n3,mud", '"road","7"\n"mud","3"', "7 road\n3 mud", "7,road\n3,mud",
    "# a comment\nroad,7\n\nmud,3,,\n",
]  # fmt: skip
COLOURS = [
    "64 128 64\tAnimal\n192 0 128\t\tRoad\n", "name,r,g,b\nAnimal,64,128,64\nRoad,192,0,128",
    "Animal,#408040\nRoad,#C00080", "Animal:64,128,64::\nRoad:192,0,128::",
    'class,rgb\nAnimal,"64,128,64"\nRoad,"(192, 0, 128)"', "64,128,64,Animal\n192,0,128,Road",
    "Animal 64 128 64\nRoad 192 0 128", "r;g;b;name\n64;128;64;Animal\n192;0;128;Road",
]  # fmt: skip


@pytest.mark.parametrize("text", IDS)
def test_ids_in_any_form(tmp_path, text):
    label_map = classes_of(tmp_path, text)
    assert label_map.classes == ("road", "mud") and label_map.reading == "values"
    assert meaning(label_map) == {7: "road", 3: "mud", 255: "ignored"}


@pytest.mark.parametrize("text", COLOURS)
def test_colours_in_any_form(tmp_path, text):
    label_map = classes_of(tmp_path, text)
    assert label_map.reading == "colours"
    assert meaning(label_map) == {0x408040: "Animal", 0xC00080: "Road"}


def test_lists_of_rugd_and_cvat(tmp_path):
    by_colour = classes_of(tmp_path, RUGD)
    assert by_colour.classes == ("void", "dirt", "picnic-table") and by_colour.reading == "colours"
    assert meaning(by_colour) == {0: "void", 0x6C4014: "dirt", 0xDC143C: "picnic-table"}
    by_id = classes_of(tmp_path, RUGD, masks_hold="ids")
    assert meaning(by_id) == {0: "void", 1: "dirt", 2: "picnic-table", 255: "ignored"}
    assert meaning(classes_of(tmp_path, CVAT)) == {0: "background", 0x804080: "road"}


def test_what_the_masks_hold_decides_between_ids_and_colours(tmp_path):
    for name, mask, expected in (
        ("ids", [[0, 1, 2, 255]], [0, 1, 2, 255]),
        ("colours", [[[0, 0, 0], [108, 64, 20], [220, 20, 60]]], [0, 1, 2]),
    ):
        prepare("folder", *folder(tmp_path / name, RUGD, np.array(mask)))
        assert stored(tmp_path / name / "out")["a.jpg"]["labels"].ravel().tolist() == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"])
def test_names_in_any_encoding(tmp_path, encoding):
    label_map = classes_of(tmp_path, "Straße;0\nforêt;1\n".encode(encoding))
    assert label_map.classes == ("Straße", "forêt")


def test_ids_stay_whatever_their_order_in_the_file(tmp_path):
    label_map = classes_of(tmp_path, "foreground;1\nbackground;0\n")
    assert label_map.classes == ("background", "foreground") and dict(label_map.table) == {1: 1, 0: 0, 255: 255}
    assert classes_of(tmp_path, "sky,20\nroad,10").classes == ("sky", "road")  # not 0, 1: in the file's order


def test_names_alone_keep_blanks_numbers_and_quotes(tmp_path):
    assert classes_of(tmp_path, "road\nlane 1\ntraffic light\n").classes == ("road", "lane 1", "traffic light")
    assert classes_of(tmp_path, '"traffic light, red",1\nroad,0').classes == ("road", "traffic light, red")
    assert classes_of(tmp_path, '"lane 1"\n"lane 2"').classes == ("lane 1", "lane 2")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("road\n\x07mud", 2), ("road\nmu\u200bd", 2), ("road\n---\n", 2), ("road,1\n,2", 2), ("road,1\nmud", 2),
        ("road,1\nmud,1", 2), ("road\nroad", 2), ("road\nRoad", 2), ("road\n7", 2), ("lane 1\nlane 2", 1),
        ("0 void 0 0 0\n1 dirt 108 64 20\n5 tree 0 255", 3), ('road,1\n"mud,2', 2), ("id,r\n1,2", 1), ("road,1,2", 1),
        ("road,300", 1), ("road\n" + "x" * 300, 2), ("road;1\nmud,2", 2),
    ],
)  # fmt: skip
def test_what_is_odd_is_refused_with_file_and_line(tmp_path, text, line):
    with pytest.raises(ValueError, match=f"classes.txt line {line}: ") as error:
        classes_of(tmp_path, text)
    assert len(str(error.value)) - len(str(tmp_path)) < 250 and "\n" not in str(error.value)


def test_too_many_and_no_classes_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"classes.txt lists 256 classes; .* 255"):
        classes_of(tmp_path, "\n".join(f"class{i}x" for i in range(256)))
    assert len(classes_of(tmp_path, "\n".join(f"class{i}x" for i in range(255))).classes) == 255
    for empty in ("", "\n\n", "name,id\n", "# nothing\n"):
        with pytest.raises(ValueError, match="classes.txt names no class"):
            classes_of(tmp_path, empty)
    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        read_classes(tmp_path / "nothing.txt")


def test_masks_as_tiff_and_bmp_and_no_lossy_ones(tmp_path):
    mask = np.array([[0, 1, 255]], np.uint8)
    for suffix in (".tif", ".TIFF", ".bmp"):
        argv = folder(tmp_path / suffix, "road\nmud", mask)
        (tmp_path / suffix / "masks/a.png").unlink()
        save(tmp_path / suffix / f"masks/a{suffix}", mask)
        prepare("folder", *argv)
        assert stored(tmp_path / suffix / "out")["a.jpg"]["labels"].tolist() == mask.tolist(), suffix
    (tmp_path / "jpeg.tif").write_bytes(b"")
    lossy = save(tmp_path / "jpeg.tif", np.zeros((16, 16)), compression="jpeg").read_bytes()
    with pytest.raises(ValueError, match="lossy TIFF"):
        classes_of(tmp_path, "road\nmud").labels(lossy)


def test_smoothed_edges_count_as_the_nearest_colour_on_request(tmp_path):
    mask = np.array([[[0, 0, 0], [250, 3, 0], [255, 0, 0], [3, 3, 3]]], np.uint8)
    argv = folder(tmp_path, "road,0,0,0\nmud,255,0,0", mask)
    for more in ((), ("--tolerance", 2)):
        with pytest.raises(ValueError, match=r"masks/a.png holds the colours \("):
            prepare("folder", *argv, *more)
    manifest = prepare("folder", *argv, "--tolerance", 5)
    assert stored(tmp_path / "out")["a.jpg"]["labels"].tolist() == [[0, 1, 1, 0]]
    assert any("2 pixels in 1 masks" in note for note in manifest["notes"])
    ids = folder(tmp_path / "ids", "road,0\nmud,255", np.array([[0, 2, 253, 255]]))
    prepare("folder", *ids, "--tolerance", 2)
    assert stored(tmp_path / "ids/out")["a.jpg"]["labels"].tolist() == [[0, 0, 1, 1]]
