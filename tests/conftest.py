"""Small random models, made once; no test reaches the network."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process of tests per core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import TYPE_CHECKING

import pytest

# torch is imported where it is used: the process that divides the tests among others starts them seconds sooner.
if TYPE_CHECKING:
    import torch

    from tqdm_seg.configuration_tqdm import TqdmConfig
    from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation


def micro_config(tower: str = "clip", **overrides) -> "TqdmConfig":
    """The smallest model that has every part: 32 px, 8 px patches, three classes, nothing random in its forward."""
    from tqdm_seg.configuration_tqdm import TqdmConfig

    fields = {
        "id2label": {0: "road", 1: "traffic light", 2: "sky"},
        "vision_config": {
            "tower": tower, "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48,
            "num_attention_heads": 2, "num_hidden_layers": 4, "feature_layers": [0, 1, 2, 3], "projection_dim": 16,
        },
        "text_config": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "projection_dim": 16,
        },
        "hidden_size": 32, "group_norm_groups": 8, "context_decoder_hidden_size": 16, "context_decoder_layers": 1,
        "context_decoder_heads": 2, "context_decoder_dropout": 0, "pixel_decoder_layers": 1, "pixel_decoder_heads": 2,
        "pixel_decoder_ffn_dim": 32, "mask_decoder_layers": 2, "mask_decoder_heads": 2, "mask_decoder_ffn_dim": 32,
        "num_points": 40, "window_size": 32, "window_stride": 20,
    }  # fmt: skip
    for part in ("vision_config", "text_config"):
        fields[part] |= overrides.pop(part, {})
    return TqdmConfig.from_preset("tiny", **{**fields, **overrides})


def micro_model(tower: str = "clip", **overrides) -> "TqdmForSemanticSegmentation":
    """A model of `micro_config`, the same weights every time, in eval mode."""
    import torch

    from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation

    torch.manual_seed(0)
    return TqdmForSemanticSegmentation(micro_config(tower, **overrides)).eval()


@pytest.fixture(scope="module")
def one_thread():
    """Torch computes on one thread while the tests of a module run."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def code_of_folders():
    """What a module loads of saved folders' code, and where from, is forgotten at its end.

    Python reads the first `transformers_modules` on its path, and keeps it: the next module's folders are elsewhere.
    """
    path = [*sys.path]
    yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def auto_classes():
    """The Auto classes know the package's model while the tests of a module run, as after `trust_remote_code`."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForSemanticSegmentation

    from tqdm_seg.configuration_tqdm import TqdmConfig
    from tqdm_seg.modeling_tqdm import TqdmForSemanticSegmentation, TqdmModel

    mappings = CONFIG_MAPPING, AutoModel._model_mapping, AutoModelForSemanticSegmentation._model_mapping
    before = [dict(mapping._extra_content) for mapping in mappings]
    AutoConfig.register("tqdm", TqdmConfig, exist_ok=True)
    AutoModel.register(TqdmConfig, TqdmModel, exist_ok=True)
    AutoModelForSemanticSegmentation.register(TqdmConfig, TqdmForSemanticSegmentation, exist_ok=True)
    yield
    for mapping, content in zip(mappings, before, strict=True):  # else the code of folders is no longer taken
        mapping._extra_content.clear()
        mapping._extra_content.update(content)


@pytest.fixture(params=["clip", "eva02"])
def model(request) -> "TqdmForSemanticSegmentation":
    """A micro model with each vision tower."""
    return micro_model(request.param)


@pytest.fixture
def images() -> "torch.Tensor":
    """Two normalised images (2, 3, 32, 32)."""
    import torch

    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> "torch.Tensor":
    """Label maps (2, 32, 32) of three classes with an ignored band."""
    import torch

    values = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(2))
    values = values.repeat_interleave(8, 1).repeat_interleave(8, 2)
    values[:, :3] = 255
    return values
