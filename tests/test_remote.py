"""Prepared datasets behind web servers that misbehave: other tries help, or one sentence names the trouble."""

import contextlib
import functools
import http.server
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from shard_helpers import call, orfd, prepare

from tqdm_seg.commands import start
from tqdm_seg.data import remote
from tqdm_seg.data.frames import FrameDataset
from tqdm_seg.data.shards import read_frame, read_index


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared dataset of two shards."""
    root, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("prepared") / "out"
    prepare("orfd", orfd(root, 4, size=16), out, "--rows-per-shard", 2)
    return out


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """Answers the first `times` requests of a kind for a file as `fault` says, later ones properly."""

    fault, times, kinds = "", 1, ("GET",)
    asked: Counter = Counter()

    def __init__(self, *args, directory: str):
        self.folder = Path(directory)
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        wanted = self.headers.get("Range", "") if self.fault != "no ranges" else ""
        content = path.read_bytes()
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1]
        self.asked[self.command, self.path, wanted] += 1
        bad = self.asked[self.command, self.path, wanted] <= self.times and self.command in self.kinds
        if bad and self.fault.isdecimal():
            self.send_response(int(self.fault))
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if bad and self.fault == "reset":
            self.connection.close()
            return
        if bad and self.fault == "silence":
            time.sleep(3)
        if bad and self.fault == "other bytes":
            content = bytes(len(content))
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(BrokenPipeError):  # the reader gave up
                self.wfile.write(content[: len(content) // 2] if bad and self.fault == "short" else content)


@pytest.fixture
def serve(folder, monkeypatch):
    """Starts a server with a fault; its URL."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    servers = []

    def started(fault: str, times: int = 1, kinds: tuple[str, ...] = ("GET",)) -> str:
        handler = type("Handler", (Misbehaving,), {"fault": fault, "times": times, "kinds": kinds, "asked": Counter()})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("fault", ["500", "503", "429", "short", "reset", "other bytes"])
def test_what_passes_is_asked_for_again(folder, serve, fault):
    here, there = FrameDataset(str(folder), "train"), FrameDataset(serve(fault, 2, ("GET", "HEAD")), "train")
    for row in range(len(here)):
        assert np.array_equal(here[row].image, there[row].image) and np.array_equal(here[row].labels, there[row].labels)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("500", "HTTP status 500"), ("429", "HTTP status 429"), ("403", "HTTP status 403"), ("short", "tries|damaged"),
     ("reset", "6 tries")],
)  # fmt: skip
def test_what_stays_is_one_sentence_that_names_the_url(serve, fault, words):
    url = serve(fault, 10**6)
    with pytest.raises((OSError, ValueError), match=words) as error:
        read_index(url)
    assert url in str(error.value) and len(str(error.value)) < 300
    assert start("check", [url, "--workers", "1"]) == 1


def test_what_is_gone_is_not_waited_for(serve, folder):
    with pytest.raises(FileNotFoundError, match="holds no manifest.json"):
        read_index(serve("") + "/nothing")
    with pytest.raises(FileNotFoundError, match="holds no manifest.json"):
        read_index(folder / "nothing")


def test_bytes_that_stay_wrong_are_the_files_fault(serve):
    index = read_index(serve(""), "train")
    wrong = serve("other bytes", 10**6)
    with pytest.raises(ValueError, match="is not what was written"):
        read_frame(type(index)(wrong, index.manifest, index.table), 0)


def test_a_server_without_ranges_is_named_before_the_first_frame(serve):
    with pytest.raises(OSError, match="ignores byte ranges"):
        FrameDataset(serve("no ranges"), "train")


def test_silence_ends_with_a_named_error(serve, monkeypatch):
    monkeypatch.setattr(remote, "TIME_LIMIT", 0.5)
    monkeypatch.setattr(remote, "TRIES", 2)
    begin = time.perf_counter()
    with pytest.raises(OSError, match="no answer within 0.5 seconds"):
        read_index(serve("silence", 10**6))
    assert time.perf_counter() - begin < 10


def test_nobody_listens_and_no_such_protocol(serve, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    with pytest.raises(OSError, match="cannot read http://127.0.0.1:9/manifest.json after 2 tries"):
        read_index("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="htp://x is no folder and no URL"):
        read_index("htp://x")


def test_check_reads_urls(serve, folder, capsys):
    call("check", serve("500"), "--workers", 1)
    assert "4 frames, all correct" in capsys.readouterr().err
    shard = sorted((folder / "data").iterdir())[0]
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:100] + b"x" + whole[101:])
        with pytest.raises(ValueError, match=shard.name):
            call("check", serve(""), "--workers", 1)
    finally:
        shard.write_bytes(whole)
