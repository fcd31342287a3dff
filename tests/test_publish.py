"""The model folder on its way to the Hub: a hub on this machine gets every byte; the card says what was measured."""

import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate import Accelerator
from conftest import micro_model
from huggingface_hub import ModelCard
from shard_helpers import contents, orfd, prepare

from tqdm_seg.data.files import MARK
from tqdm_seg.data.frames import FrameDataset, PlainRows, frame_loader
from tqdm_seg.deploy.folder import save_model_folder
from tqdm_seg.evaluation.evaluate import score_frames
from tqdm_seg.image_processing_tqdm import TqdmImageProcessor
from tqdm_seg.program import parse
from tqdm_seg.training.card import changed_options, hub_name, model_card, overlap_text
from tqdm_seg.training.options import TrainOptions
from tqdm_seg.training.sets import FrameSets, TrainSet

CLASSES = {0: "non-traversable", 1: "traversable"}
EXAMPLE = Path(__file__).parents[1] / "examples" / "orfd_mini"
TOKEN = "hf_not_a_real_token"
parse_args = partial(parse, TrainOptions, "")
# Run in a new interpreter, for huggingface_hub reads its environment when it is imported: pushes a folder to
# repositories, each at an address or, "-", where the environment says.
PUSH = """
import sys
from pathlib import Path
from huggingface_hub import constants
from tqdm_seg.deploy.folder import push_folder
for address, repository in zip(sys.argv[2::2], sys.argv[3::2]):
    if address != "-":
        constants.ENDPOINT = address
    try:
        print("PUSHED", push_folder(Path(sys.argv[1]), repository))
    except OSError as error:
        print("REFUSED", error)
"""


# -- a hub ----------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks a hub for when a folder is uploaded, and no more.

    files: what was committed, {repository: {path: content}}. forbidden: calls, such as "commit me/model", that are
    answered by 403. Weights go by way of LFS objects, as on the real one.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.forbidden: set[str] = set()


class Request(BaseHTTPRequestHandler):
    """One call."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def answer(self, content: object, status: int = 200) -> None:
        """Sends JSON."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        """What was sent, whole or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self) -> None:  # noqa: N802
        """An LFS object; its name is the checksum that it must have."""
        content = self.body()
        name = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(content).hexdigest() != name:
            return self.answer({"error": "checksum"}, 400)
        self.server.objects[name] = content
        return self.answer({})

    def do_GET(self) -> None:  # noqa: N802
        """Whether a repository is there."""
        name = self.path.removeprefix("/api/models/")
        found = name in self.server.files
        self.answer({"id": name, "sha": "0" * 40} if found else {"error": "no such repository"}, 200 if found else 404)

    def do_POST(self) -> None:  # noqa: N802
        """Everything else."""
        hub, content = self.server, self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "who are you?"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            if f"create {name}" in hub.forbidden:
                return self.answer({"error": "no right to write here"}, 403)
            if name in hub.files:
                return self.answer({"error": "it exists", "url": f"{hub.address}/{name}"}, 409)
            hub.files[name] = {}
            return self.answer({"url": f"{hub.address}/{name}"})
        if self.path == "/api/validate-yaml":
            text = json.loads(content)["content"]
            yaml.safe_load(text.split("---")[1])
            return self.answer({"warnings": [], "errors": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            modes = [
                {"path": file["path"], "shouldIgnore": False, "uploadMode": lfs_or_regular(file["path"])}
                for file in json.loads(content)["files"]
            ]
            return self.answer({"files": modes})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{hub.address}/objects/{entry['oid']}"}}}
                for entry in json.loads(content)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            if f"commit {match[1]}" in hub.forbidden:
                return self.answer({"error": "no right to write here"}, 403)
            for line in content.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.files[match[1]][value["path"]] = base64.b64decode(value["content"])
                if entry["key"] == "lfsFile":
                    hub.files[match[1]][value["path"]] = hub.objects[value["oid"]]
            commit = "1" * 40
            return self.answer({"commitUrl": f"{hub.address}/{match[1]}/commit/{commit}", "commitOid": commit})
        return self.answer({"error": f"no such call: {self.path}"}, 404)


def lfs_or_regular(path: str) -> str:
    """How the real hub takes a file, by its default .gitattributes."""
    return "lfs" if path.endswith(".safetensors") else "regular"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that listens."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def environment(address: str, home: Path) -> dict[str, str]:
    """Variables under which huggingface_hub knows this hub only, with its token and a home of its own."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return variables | {
        "HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip


# -- the push -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_file_of_a_training_arrives_byte_for_byte_with_its_card(hub, tmp_path):
    data = tmp_path / "data"
    orfd(tmp_path / "raw", size=32, split="training")
    orfd(tmp_path / "raw", size=32, split="validation", scene="y0609_1947")
    prepare("orfd", tmp_path / "raw", data)
    micro_model(id2label=CLASSES, vision_config={"drop_path_rate": 0}).save_pretrained(tmp_path / "start")
    TqdmImageProcessor().save_pretrained(tmp_path / "start")
    options = f"--model {tmp_path / 'start'} --data {data} --out {tmp_path / 'run'} --steps 1 --crop 32 --min-pixels 9"
    options += " --batch-size 1 --tracker none --overlays 1 --push-to-hub me/my-model"
    command = [sys.executable, Path(__file__).parents[1] / "train.py", *shlex.split(options)]
    result = subprocess.run(command, env=environment(hub.address, tmp_path / "home"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    assert f"{hub.address}/me/my-model/commit/" in result.stdout
    expected = contents(tmp_path / "run" / "model")
    assert expected.pop(MARK)  # which stays: it marks a folder of this computer
    assert {"README.md", "config.json", "model.safetensors", "modeling_tqdm.py", "results.json"} < expected.keys()
    assert hub.files == {"me/my-model": expected}
    (tmp_path / "card.md").write_bytes(expected["README.md"])
    card = ModelCard.load(tmp_path / "card.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-segmentation", "transformers")
    assert card.data.eval_results[0].metric_type == "mean_iou"
    assert '"me/my-model"' in card.content


@pytest.mark.slow
def test_a_push_that_fails_loses_nothing_and_its_command_pushes_later(hub, tmp_path):
    folder = tmp_path / "my runs" / "model"  # a name with a space
    save_model_folder(micro_model(), TqdmImageProcessor(), folder, {"README.md": "---\nlicense: mit\n---\n"})
    before, variables = contents(folder), environment(hub.address, tmp_path / "home")
    hub.forbidden = {"create me/first", "commit me/second"}
    silent = Hub()
    silent.server_close()  # nobody listens there now
    targets = ["-", "me/first", "-", "me/second", silent.address, "me/third"]
    command = [sys.executable, "-c", PUSH, folder, *targets]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    said = re.split(r"^(?=PUSHED|REFUSED)", result.stdout, flags=re.MULTILINE)[1:]
    reasons = {"me/first": "HfHubHTTPError.*403", "me/second": "HfHubHTTPError.*403", "me/third": "ConnectError"}
    for (name, reason), text in zip(reasons.items(), said, strict=True):
        assert re.match(rf"REFUSED {name} could not be pushed \({reason}", text, re.DOTALL), text
        assert "nothing is lost, try again with: " in text
    assert contents(folder) == before and hub.files == {"me/second": {}}

    hub.forbidden = set()
    command = shlex.split(re.search(r"try again with: (.*)", said[0])[1])
    assert command == ["hf", "upload", "me/first", str(folder), "."]
    subprocess.run(command, env=variables, check=True, capture_output=True)
    assert hub.files["me/first"] == before


# -- the card -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> tuple[object, dict[str, object], FrameSets, FrameDataset]:
    """A model, what evaluation found on two frames, training and held-back data."""
    model = micro_model(id2label=CLASSES, window_size=None)
    training, validation = (FrameDataset(str(EXAMPLE), split) for split in ("train", "validation"))
    frames = islice(frame_loader(validation, 0), 2)
    return (
        model,
        score_frames(model, TqdmImageProcessor(), frames, validation.label_map, Accelerator()),
        FrameSets([TrainSet("", training, Fraction(1))]),
        validation,
    )


def card_of(measured: tuple, *options: str, **changes: object) -> ModelCard:
    """The card of a run with these options, as the Hub reads it; changes: other results."""
    model, results, training, validation = measured
    args = parse_args(["--data", str(EXAMPLE), *options])
    return ModelCard(model_card(args, model, results | changes, training, validation))


def test_metadata_holds_task_licence_and_the_figure(measured):
    data = card_of(measured, "--out", "runs/my_run", "--license", "mit").data
    assert (data.pipeline_tag, data.library_name, data.license) == ("image-segmentation", "transformers", "mit")
    assert data.metrics == ["mean_iou"] and "semantic-segmentation" in data.tags
    assert (data.datasets, data.base_model) == (None, None)  # neither is on the Hub
    assert data.model_name == "my_run"
    (figure,) = data.eval_results
    assert (figure.task_type, figure.metric_type, figure.metric_name) == (
        "image-segmentation",
        "mean_iou",
        "mIoU over 2 classes",
    )
    assert (figure.dataset_name, figure.dataset_type, figure.dataset_split) == ("ORFD", "orfd", "validation")
    assert figure.metric_value == round(measured[1]["miou"], 4) and figure.verified is None


def test_what_lies_on_the_hub_is_linked(measured, tmp_path, monkeypatch):
    card = card_of(measured, "--data", "hf://datasets/me/orfd/v1", "--push-to-hub", "you/offroad")
    assert card.data.datasets == ["me/orfd"] and card.data.eval_results[0].dataset_type == "me/orfd"
    assert card.data.model_name == "offroad" and '"you/offroad"' in card.content
    cache = tmp_path / "hub" / "models--me--start" / "snapshots" / "0123"
    assert card_of(measured, "--model", str(cache)).data.base_model == "me/start"
    monkeypatch.chdir(tmp_path)
    Path("data/orfd").mkdir(parents=True)
    names = {"me/orfd": "me/orfd", "data/orfd": None, "/data/orfd": None, "https://host/me/orfd": None, "tiny": None}
    assert {place: hub_name(place) for place in names} == names


def test_without_a_figure_the_metadata_claims_none(measured):
    card = card_of(measured, miou=None, iou=dict.fromkeys(CLASSES.values()))
    assert card.data.eval_results is None and "model-index" not in card.content
    assert re.search(r"\| \*\*mean.*\*\* \| \*\*N/A\*\* \|", card.content)


def test_every_section_says_what_was_done(measured):
    text = card_of(measured, "--steps", "7", "--crop", "96", "--vision", "lora").text
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "Result", "Labels", "Data", "Recipe", "Intended use and limits", "Citation"
    ]  # fmt: skip
    _, results, training, validation = measured
    assert all(f"| {name} | {100 * iou:.2f} |" in text for name, iou in results["iou"].items())
    assert re.search(rf"\| \*\*mean over .*\*\* \| \*\*{100 * results['miou']:.2f}\*\* \|", text)
    protocol = results["protocol"]
    for stamp in ("2 held-back frames; images 224x224, whole", "test-time augmentation: none", "fp32"):
        assert stamp in text
    assert protocol["interpolation"] in text and protocol["labels"]["policy"] in text and protocol["pooling"] in text
    assert f"split `train`, {len(training)} frames" in text and f"split `validation`, {len(validation)} frames" in text
    assert "Both parts hold frames of x2021_0223_1756" in text
    assert "From random weights: 7 steps" in text and "knows no language" in text
    assert "Not for steering a vehicle" in text
    assert "](modeling_tqdm.py)" in text and "https://github.com/ByeongHyunPak/tqdm" in text
    assert re.search(r"```bibtex\n@inproceedings\{.*2407\.09033", text, re.DOTALL)


def test_names_of_users_break_neither_metadata_nor_markdown(measured):
    strange = "a | `b` <c>\n---\n# d: [e]"
    model, results, training, validation = measured
    name = strange.replace("\n", " ")  # a class name has one line
    model = micro_model(id2label={0: name, 1: "road"}, window_size=None)
    named = results | {"iou": {name: 0.25, "road": 0.5}}
    options = TrainOptions(data=str(EXAMPLE), eval_data=strange, license='x: "y"', out=Path('my "runs" #1'))
    card = ModelCard(model_card(options, model, named, training, validation))
    assert card.data.license == 'x: "y"' and card.data.eval_results[0].metric_value == round(results["miou"], 4)
    (row,) = [line for line in card.text.splitlines() if line.startswith("| 0 |")]
    assert len(re.split(r"(?<!\\)\|", row)) == 5 and row.endswith("| 25.00 |")
    assert re.findall(r"^#+ (\w+)", card.text, re.MULTILINE)[:2] == ["tqdm", "Result"]
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(code, "card", "exec")


def test_the_best_model_of_a_run_says_how_it_was_chosen(measured):
    text = card_of(measured, "--steps", "90", step=40).text
    assert "after step 40 of 90, the best so far on these very frames" in text and "quickstart/best" in text
    assert "best so far" not in card_of(measured).text and "quickstart/model" in card_of(measured).text


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--no-index --class-names road,'traffic light' --data me/photos --label-column mask",
        "--model 'my start' --eval-size 1024x2048 --lr 1e-4 --weight-decay 1e-5 --no-embedding-decay --seed 2023 "
        "--precision bf16 --visual-weight 0 --teacher-drop-path --resize whole --push-to-hub me/it",
    ],
)
def test_the_recipe_is_the_command_line_of_the_run(line):
    args = parse_args(shlex.split(line))
    words = changed_options(args)
    assert parse_args(words) == args and len(words) == len(shlex.split(line))
    assert changed_options(parse_args([*shlex.split(line), "--resume"])) == words


def test_the_recipe_stands_in_the_card_as_it_was_given(measured):
    text = card_of(measured, "--steps", "7", "--no-embedding-decay").text
    (command,) = re.findall(r"^accelerate launch train\.py(.*)$", text, re.MULTILINE)
    assert parse_args(shlex.split(command)) == parse_args(
        ["--data", str(EXAMPLE), "--steps", "7", "--no-embedding-decay"]
    )


class Frames(FrameDataset):
    """Scenes of a data set, and nothing else of it."""

    def __init__(self, dataset: str, *scenes: str):
        self.scenes, self.classes = list(scenes), ["road"]
        manifest = {"dataset": dataset, "classes": self.classes, "label_map": {"name": "a", "sha256": ""}}
        self.index = SimpleNamespace(manifest=manifest)

    def __len__(self) -> int:
        return len(self.scenes)


@pytest.mark.parametrize(
    ("training", "validation", "said"),
    [
        (Frames("ORFD", "a", "b"), Frames("ORFD", "c"), "No scene is in both parts"),
        (Frames("ORFD", "a", "b"), Frames("Road3D", "c", "b"), "Both parts hold frames of b,"),
        (Frames("GTA5", ""), Frames("BDD100K", ""), "Trained and tested on different data sets"),
        (Frames("GTA5", ""), Frames("Cityscapes", "frankfurt"), "Trained and tested on different data sets"),
        (Frames("SYNTHIA", ""), Frames("SYNTHIA", ""), "may be neighbours"),
        (
            PlainRows("a", "train", ("x",)),
            PlainRows("a", "test", ("x",)),
            "which scenes are in both parts is not known",
        ),
    ],
)
def test_the_card_claims_of_scenes_what_is_known(training, validation, said):
    if isinstance(training, Frames):
        training = FrameSets([TrainSet("", training, Fraction(1))])
    assert said in overlap_text(training, validation)
