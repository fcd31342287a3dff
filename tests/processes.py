"""Real processes for tests, forked from one that has loaded the libraries: a start takes a moment instead of seconds.

They have loaded nothing of this project. Variables that libraries read when they are imported (HF_HOME) come too late.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

LIBRARIES = [
    "torch", "torch.distributed", "torchvision.transforms.v2", "accelerate", "datasets", "safetensors.torch",
    "transformers.modeling_utils", "transformers.masking_utils", "transformers.models.auto.modeling_auto",
    "transformers.pipelines", "transformers.image_processing_utils", "transformers.trainer", "open_clip",
]  # fmt: skip
HAS_SERVER = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if HAS_SERVER else "spawn")
if HAS_SERVER:
    CONTEXT.set_forkserver_preload(LIBRARIES)


class PythonProcess:
    """`python *words` with these variables on top of the environment: a script, `-m MODULE` or `-c CODE`, arguments."""

    def __init__(self, *words: object, folder: Path | None = None, **variables: str) -> None:
        with NamedTemporaryFile(delete=False) as file:
            self.printed = Path(file.name)
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        arguments = ([str(word) for word in words], str(folder or Path.cwd()), environment, self.printed)
        self.process = CONTEXT.Process(target=run_python, args=arguments)
        self.process.start()

    def send_signal(self, number: int) -> None:
        """Sends the signal."""
        os.kill(self.process.pid, number)

    def poll(self) -> int | None:
        """The exit status, below 0 after a signal; None while it runs."""
        return self.process.exitcode

    def finish(self, timeout: float = 240) -> tuple[int, str]:
        """The exit status, and what was printed to stdout and stderr."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        output = self.printed.read_text(encoding="utf-8", errors="replace")
        self.printed.unlink()
        return self.process.exitcode, output


def run_python(words: list[str], folder: str, environment: dict[str, str], printed: Path) -> None:
    """In the new process: becomes the program."""
    import torch

    with open(printed, "wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    first, *rest = words
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def finish(*words: object, folder: Path | None = None, **variables: str) -> str:
    """Runs `python *words` to its good end; what it printed."""
    status, output = PythonProcess(*words, folder=folder, **variables).finish()
    assert status == 0, output
    return output


def finish_two(*words: object, **variables: str) -> str:
    """Runs two processes of one group, as torchrun starts them, to their good end; what both printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **address}
    both = [PythonProcess(*words, **group, **variables, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    ends = [process.finish() for process in both]
    assert [status for status, _ in ends] == [0, 0], ends
    return "".join(output for _, output in ends)
