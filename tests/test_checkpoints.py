"""Checkpoints of others are read as tensors; code planted in any format does not run."""

import os
import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from tqdm_seg.commands import start
from tqdm_seg.deploy.checkpoints import read_checkpoint

VICTIM = "victim"  # in the current folder, which is one of the test


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(6, 2))
        self.out_proj = nn.Linear(2, 2)
        self.mask = torch.ones(2, 2)  # an attribute, which is in no state dict

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(x) + x @ self.in_proj_weight[:2]


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2, 2, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(2))
        self.resblocks = nn.Sequential(Attention(), Attention())
        self.ln_post = nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln_post(self.resblocks(self.conv1(x).flatten(2).transpose(1, 2) + self.class_embedding))


class Clip(nn.Module):
    """Names, half precision, views and numbers as in OpenAI's ViT-B-16.pt."""

    def __init__(self):
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(7, 2)
        self.tied = self.token_embedding
        self.positional_embedding = nn.Parameter(torch.randn(5, 2).t().contiguous().t())
        self.logit_scale = nn.Parameter(torch.ones([]) * 4.6)
        for name, value in {"input_resolution": 2, "context_length": 5, "vocab_size": 7}.items():
            self.register_buffer(name, torch.tensor(value))
        self.visual.half()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.labels = ["a", "b"]

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)


def archive(module: nn.Module, how: str) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "script":
            return torch.jit.script(module)
        return torch.jit.trace(module, torch.zeros(1, 3, 2, 2).half())


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_archives_give_the_tensors_of_their_state_dict(tmp_path, how, monkeypatch):
    torch.manual_seed(0)
    path = tmp_path / "ViT-B-16.pt"
    program = archive(Clip().eval(), how)
    program.save(path)
    expected = program.state_dict()
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the archive was run"))
    monkeypatch.setattr(torch._C, "import_ir_module", lambda *_, **__: pytest.fail("the archive was run"))
    found = read_checkpoint(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


class Planted:
    """Whatever unpickles it writes to the victim."""

    def __init__(self, call=None):
        self.call = call or (os.system, (f"touch {VICTIM}",))

    def __reduce__(self):
        return self.call


class PlantedModule(nn.Module):
    """TorchScript calls its __setstate__ while it loads, which writes to the victim."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.weight = state[0] + torch.from_file("victim", True, 8, dtype=torch.uint8).fill_(7)[0]
        self.training = state[1]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def planted_torchscript_pickle(path: Path, name: str) -> None:
    """An archive in whose data.pkl or constants.pkl a call is planted."""
    content = BytesIO()
    torch.jit.save(archive(Clip().eval(), "script"), content)
    with zipfile.ZipFile(content) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.namelist():
            planted = entry.endswith(f"/{name}")
            target.writestr(entry, pickle.dumps(Planted(), 2) if planted else source.read(entry))


def planted_tar(path: Path) -> None:
    """The format of torch before 0.1.10."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Planted(), 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))


PLANTS = {
    "zip": lambda path: torch.save({"state_dict": {"a": torch.ones(1)}, "meta": Planted()}, path),
    "legacy": lambda path: torch.save({"a": Planted()}, path, _use_new_zipfile_serialization=False),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": Planted()})),
    "tar": planted_tar,
    "numpy object": lambda path: torch.save(
        {"a": Planted((np._core.multiarray.scalar, (np.dtype("O"), Planted())))}, path
    ),
    "torchscript": lambda path: archive(PlantedModule(), "script").save(path),
    "torchscript data.pkl": lambda path: planted_torchscript_pickle(path, "data.pkl"),
    "torch.load": lambda path: torch.save({"a": Planted((torch.load, (VICTIM,)))}, path),
    "safetensors": lambda path: path.write_bytes(pickle.dumps(Planted())),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", PLANTS)
def test_planted_code_does_not_run(tmp_path, kind, suffix, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, victim = tmp_path / f"weights{suffix}", Path(VICTIM)
    PLANTS[kind](path)
    if kind == "torchscript":
        victim.write_bytes(b"whole!!!")
    assert start("convert", [str(path), "--out", str(tmp_path / "out")]) == 1
    assert victim.read_bytes() == b"whole!!!" if kind == "torchscript" else not victim.exists()
    error = capsys.readouterr().err
    assert str(path) in error
    assert len(error.splitlines()) == 1
    assert "weights_only" not in error
    assert not (tmp_path / "out").exists()


def test_the_planted_code_would_run(tmp_path, monkeypatch):
    """The test above tests something: other readers run it."""
    monkeypatch.chdir(tmp_path)
    victim = Path(VICTIM)
    archive(PlantedModule(), "script").save("a.pt")
    victim.write_bytes(b"whole!!!")
    torch.jit.load("a.pt")
    assert victim.read_bytes() != b"whole!!!"
    victim.unlink()
    pickle.loads(pickle.dumps(Planted()))
    assert victim.exists()


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_numbers_of_numpy_are_read(tmp_path, new_format):
    """mmcv's best checkpoints hold their score so."""
    path = tmp_path / "best.pth"
    meta = {"best_score": np.float64(0.57), "iter": np.int64(3), "half": np.float16(1), "flag": np.bool_(True)}
    meta["hook_msgs"] = OrderedDict(best=np.float32(0.5))
    torch.save({"meta": meta, "state_dict": {"a": torch.ones(3)}}, path, _use_new_zipfile_serialization=new_format)
    assert torch.equal(read_checkpoint(path)["a"], torch.ones(3))
    torch.save({"meta": np.ones(3), "state_dict": {}}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match="best.pth.*refused"):
        read_checkpoint(path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
WHOLE = save({"a": torch.ones(100)})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [(POINTER, "git lfs pull"), (b"", "empty"), (WHOLE[:-7], "damaged"), (WHOLE[:5], "damaged"), (b"PK\3\4", "damaged"),
     (b"<!DOCTYPE html><html>404</html>", "web page")],
    ids=["pointer", "empty", "cut", "header cut", "zip cut", "page"],
)  # fmt: skip
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, content, words, suffix, capsys):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert start("convert", [str(path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert words in error and str(path) in error and len(error.splitlines()) == 1 and len(error) <= 300


def test_numbers_that_are_not_finite_are_named(tmp_path):
    save_file({"good": torch.ones(2), "bad": torch.tensor([1, float("nan")])}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors.*bad"):
        read_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(OSError, match="folder"):
        read_checkpoint(tmp_path)
