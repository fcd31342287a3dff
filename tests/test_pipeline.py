"""A saved folder works through the Auto classes and `pipeline`, with nothing but what it was saved to need."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import micro_model
from PIL import Image
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ImageFeatureExtractionPipeline, ImageSegmentationPipeline
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from tqdm_seg.configuration_tqdm import CITYSCAPES_CLASSES
from tqdm_seg.data.files import MARK, replace_folder
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor, TqdmImageSegmentationPipeline
from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

ROOT = Path(__file__).parents[1]
PHOTOS = sorted(ROOT.glob("examples/frames/validation/*/image_data/*"))[:3]
MODEL_CODE = {
    "backbone_tqdm.py", "configuration_tqdm.py", "decoder_tqdm.py", "fast_tqdm.py", "layers_tqdm.py", "loss_tqdm.py",
    "modeling_tqdm.py", "text_tqdm.py", "windows_tqdm.py",
}  # fmt: skip
SHIPPED = MODEL_CODE | {"image_processing_tqdm.py", "images_tqdm.py"}
WRITTEN = SHIPPED | {"config.json", "preprocessor_config.json", "model.safetensors", "self_check.json", MARK}
# This project's other requirements, and itself.
HIDDEN = [
    "tqdm_seg", "open_clip", "timm", "datasets", "evaluate", "accelerate", "av", "torchao", "onnx", "onnxruntime",
]  # fmt: skip
STANDARD = set(sys.stdlib_module_names)

# Run in a new interpreter, in another folder: hides packages, then does what a user of the folder does.
USER = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, *args)

HIDDEN, FOLDER, PHOTOS = {hidden!r}, {folder!r}, {photos!r}
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]

import json
import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

torch.set_num_threads(1)
loaders = AutoConfig, AutoModel, AutoModelForSemanticSegmentation, AutoImageProcessor
config, base, model, processor = [x.from_pretrained(FOLDER, trust_remote_code=True) for x in loaders]
images = [Image.open(photo).convert("RGB") for photo in PHOTOS]
pipe = pipeline("image-segmentation", model=FOLDER, trust_remote_code=True)
results = {{"single": [pipe(image) for image in images], "batched": pipe(images, batch_size=2)}}
# Every class has its own decimal digit, so that gaps and overlaps between masks show.
maps = {{
    key: np.stack([sum((np.array(part["mask"]) > 0) * (10 ** config.label2id[part["label"]]) for part in parts)
                  for parts in result])
    for key, result in results.items()
}}
inputs = processor(images=images, return_tensors="pt")
pipe.model.prepare_for_inference()
fast = torch.cat([pipe.model.segment(x[None]) for x in inputs.pixel_values]).numpy()
np.savez(
    "arrays.npz", **maps, fast=fast, scores=torch.cat([model.segment(x[None]) for x in inputs.pixel_values]).numpy(),
    base=base(inputs.pixel_values[..., :32, :32]).mask_logits.detach().numpy(),
)
print(json.dumps({{
    "classes": [type(x).__name__ for x in (config, base, model, processor, pipe.model, pipe.image_processor)],
    "modules": [type(x).__module__.split(".")[0] for x in (config, base, model, processor, pipe.model)],
    "layers": type(pipe.model.model.pixel_decoder).__name__, "parts": len(pipe(images[0])),
    "hidden": [name for name in HIDDEN if name in sys.modules],
}}))
"""


@pytest.fixture(scope="module")
def model(pixel_values) -> TqdmForSemanticSegmentation:
    """Random weights, with the heads made steeper and centred: as they are, one class wins everywhere."""
    model = micro_model(window_size=48, window_stride=32)
    decoder = model.model.mask_decoder
    with torch.no_grad():
        for layer in decoder.mask_head[::2]:
            layer.weight.mul_(5)
        decoder.class_head.weight.mul_(10)
        decoder.class_head.bias.sub_(model.model(pixel_values).class_logits[:, -1].mean((0, 1)))
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model_folder(model, TqdmImageProcessor(), folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Real photographs, 120 x 100, so that 12 windows slide over each."""
    folder = tmp_path_factory.mktemp("photos")
    for photo in PHOTOS:
        Image.open(photo).convert("RGB").resize((120, 100)).save(folder / photo.name)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def pixel_values(photos) -> torch.Tensor:
    images = [Image.open(photo) for photo in photos]
    return TqdmImageProcessor()(images=images, return_tensors="pt").pixel_values


@pytest.fixture(scope="module")
def user(folder, photos, tmp_path_factory) -> dict:
    """What the new interpreter saw: its report, its arrays, and everything it printed."""
    home = tmp_path_factory.mktemp("user")
    program = USER.format(hidden=HIDDEN, folder=str(folder), photos=list(map(str, photos)))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=home, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    with np.load(home / "arrays.npz") as arrays:
        return {**json.loads(done.stdout.splitlines()[-1]), **arrays, "printed": done.stdout + done.stderr}


@pytest.fixture(scope="module")
def expected(model, pixel_values) -> dict[str, np.ndarray]:
    """What the Python API computes in this process, with one thread as in the other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        base = model.model(pixel_values[..., :32, :32]).mask_logits
    scores = torch.cat([model.segment(image[None]) for image in pixel_values])
    torch.set_num_threads(threads)
    return {"scores": scores.numpy(), "base": base.numpy()}


def test_folder_loads_where_only_torch_and_transformers_are_installed(user):
    assert user["classes"] == [
        "TqdmConfig", "TqdmModel", "TqdmForSemanticSegmentation", "TqdmImageProcessor", "TqdmForSemanticSegmentation",
        "TqdmImageProcessor",
    ]  # fmt: skip
    assert set(user["modules"]) == {"transformers_modules"} and user["hidden"] == []


def test_loaded_models_compute_the_same_bits(user, expected):
    np.testing.assert_array_equal(user["scores"], expected["scores"])
    np.testing.assert_array_equal(user["base"], expected["base"])


def test_a_pipeline_made_ready_gives_the_same_scores(user, expected):
    assert user["layers"] == "FastPixelDecoder" and user["parts"] > 0
    np.testing.assert_allclose(user["fast"], expected["scores"], rtol=0, atol=1e-4)


def test_pipeline_masks_are_the_argmax_of_segment_for_images_larger_than_a_window(user, expected):
    ids = expected["scores"].argmax(1)
    assert len(np.unique(ids)) > 1, "one class everywhere proves nothing"
    np.testing.assert_array_equal(user["single"], 10**ids)


def test_pipeline_in_batches_gives_what_it_gives_alone(user):
    # Larger matrix products may round otherwise on other processors, and so turn near-ties.
    assert np.mean(user["batched"] != user["single"]) < 1e-4


def test_pipeline_reports_no_problem(user):
    lines = [line for line in user["printed"].splitlines() if "Loading weights" not in line]
    assert not [line for line in lines if any(word in line.lower() for word in ("not supported", "error", "warn"))]


# ---- in this process, as transformers' own pipeline tests ask


def segmenter(kind: type[ImageSegmentationPipeline], **options: object) -> ImageSegmentationPipeline:
    """A pipeline of a micro model, large windows, 19 classes."""
    model = micro_model(id2label=dict(enumerate(CITYSCAPES_CLASSES)), window_size=128, window_stride=100)
    model.config.trained = True
    return kind(model=model, image_processor=TqdmImageProcessor(**options))


PIPELINES = [ImageSegmentationPipeline, TqdmImageSegmentationPipeline]
THRESHOLDS = {"threshold": 0.0, "mask_threshold": 0, "overlap_mask_area_threshold": 0}


@pytest.mark.parametrize("kind", PIPELINES)
def test_pipelines_take_every_kind_of_input_and_thresholds(kind):
    pipe, path = segmenter(kind), PHOTOS[0]
    photo = Image.open(path).resize((64, 40))
    small = [photo.convert(mode) for mode in ("RGB", "RGBA", "LA", "L")]
    alone = [pipe(image, **THRESHOLDS) for image in small]
    for parts, image in zip(alone, small, strict=True):
        assert parts and all(part["score"] is None and part["mask"].size == image.size for part in parts)
        masks = np.stack([np.asarray(part["mask"]) for part in parts])
        assert masks.dtype == np.uint8 and (masks.astype(int).sum(0) == 255).all()
        labels = [part["label"] for part in parts]
        assert set(labels) <= set(CITYSCAPES_CLASSES) and len(set(labels)) == len(labels)
    assert pipe(small, batch_size=2) == alone == list(pipe(x for x in small)) == pipe(small, subtask="semantic")
    assert [len(parts) > 0 for parts in pipe([str(path)] * 3, batch_size=2, **THRESHOLDS)] == [True] * 3


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("subtask", ["panoptic", "instance"])
def test_pipelines_refuse_other_subtasks(kind, subtask):
    with pytest.raises(ValueError, match=f"Subtask {subtask} is not supported for model .*TqdmForSemantic"):
        segmenter(kind)(Image.new("RGB", (40, 40)), subtask=subtask)


def test_both_pipelines_give_the_same_masks_also_of_resized_images():
    for options in ({}, {"do_resize": True, "size": {"height": 90, "width": 150}}):
        pipes = [segmenter(kind, **options) for kind in PIPELINES]
        results = [pipe([PHOTOS[0].as_posix(), PHOTOS[1].as_posix()], batch_size=2) for pipe in pipes]
        assert results[0] == results[1]


def test_features_come_from_a_pipeline_too():
    pipe = ImageFeatureExtractionPipeline(model=micro_model().model, image_processor=TqdmImageProcessor())
    photo = Image.open(PHOTOS[0]).resize((64, 40))
    assert np.shape(pipe(photo)) == (1, 3, 3, 4)  # class logits of every layer
    assert len(pipe([photo, photo], batch_size=2)) == 2 and pipe(photo, return_tensors=True).shape == (1, 3, 3, 4)


class PeakMemory(TorchDispatchMode):
    """Most bytes of tensors made inside that lived at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: value for key, value in self.live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize(("kind", "copies"), list(zip(PIPELINES, (1.5, 0.9), strict=True)))
def test_the_scores_of_a_large_image_are_held_once_or_in_part(kind, copies):
    image, pipe = Image.open(PHOTOS[0]).resize((640, 260)), segmenter(kind)
    scores = 4 * 19 * 260 * 640
    pipe.model.score = lambda windows, _: windows[:, :1].repeat(1, 19, 1, 1)  # without the memory of its layers
    with PeakMemory() as memory:
        parts = pipe(image)
    assert parts and memory.peak < copies * scores


@pytest.mark.parametrize("size", [(40, 50), (90, 70), (23, 31)])
def test_resized_class_by_class_the_ids_are_the_argmax(size):
    scores = (torch.randn(2, 19, 40, 50, generator=torch.Generator().manual_seed(0)) * 3).round()  # with ties
    processor, outputs = TqdmImageProcessor(), SimpleNamespace(logits=scores.requires_grad_())
    ids = processor.post_process_semantic_segmentation(outputs, [size] * 2)
    resized = torch.nn.functional.interpolate(scores, size, mode="bilinear", align_corners=False)
    assert torch.equal(torch.stack(ids), resized.argmax(1))
    full = processor.post_process_semantic_segmentation(outputs, [size] * 2, return_segmentation_scores=True)
    assert all(torch.equal(part["segmentation"], one) for part, one in zip(full, ids, strict=True))
    assert torch.equal(torch.stack([part["segmentation_scores"] for part in full]), resized)


def test_folder_holds_exactly_what_is_needed(folder):
    assert {file.name for file in folder.iterdir()} == WRITTEN
    config, preprocessor = (json.loads((folder / f"{x}config.json").read_text()) for x in ("", "preprocessor_"))
    assert config["auto_map"] == {
        "AutoConfig": "configuration_tqdm.TqdmConfig",
        "AutoModel": "modeling_tqdm.TqdmModel",
        "AutoModelForSemanticSegmentation": "modeling_tqdm.TqdmForSemanticSegmentation",
    }
    assert preprocessor["auto_map"] == {"AutoImageProcessor": "image_processing_tqdm.TqdmImageProcessor"}


def test_saved_again_the_folder_is_the_same(folder, model, tmp_path):
    loaded, report = TqdmForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    again = tmp_path / "again"
    save_model_folder(loaded, TqdmImageProcessor.from_pretrained(folder), again)
    assert {file.name for file in again.iterdir()} == WRITTEN
    for file in WRITTEN - {"config.json"}:
        assert (again / file).read_bytes() == (folder / file).read_bytes(), file
    # Parts of a model that was never loaded have no dtype noted, or it is not written, by version; it is the whole's.
    before, after = (re.sub(r'\n *"dtype": .*', "", (path / "config.json").read_text()) for path in (folder, again))
    assert before == after
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_only_inference_code_ships():
    entry = ROOT / "modeling_tqdm.py"
    files = [entry, *map(Path, get_relative_import_files(entry))]
    assert {file.name for file in files} == MODEL_CODE
    imports = set().union(*map(get_imports, files))
    assert {name.split(".")[0] for name in imports} <= {"torch", "transformers", "huggingface_hub"} | STANDARD
    processor = ROOT / "image_processing_tqdm.py"
    files = [processor, *map(Path, get_relative_import_files(processor))]
    assert {file.name for file in files} == {"image_processing_tqdm.py", "images_tqdm.py"}
    imports = {name.split(".")[0] for file in files for name in get_imports(file)}
    assert imports <= {"torch", "torchvision", "transformers", "numpy", "PIL"} | STANDARD


def test_card_is_written_and_a_folder_with_other_files_is_left_alone(folder, model, tmp_path):
    target = tmp_path / "model"
    save_model_folder(model, TqdmImageProcessor(), target, files={"README.md": "# first\n"})
    save_model_folder(model, TqdmImageProcessor(), target, files={"README.md": "# second\n"})
    assert (target / "README.md").read_text() == "# second\n"
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        save_model_folder(model, TqdmImageProcessor(), target, files={"README.md": "# third\n"})
    assert (target / "README.md").read_text() == "# second\n" and (target / "notes.txt").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_interrupted_writing_leaves_the_old_folder_and_nothing_else(tmp_path):
    target = tmp_path / "folder"
    with replace_folder(target, "train") as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), replace_folder(target, "train") as temporary:
        (temporary / "a").write_text("new")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "old" and list(tmp_path.iterdir()) == [target]
