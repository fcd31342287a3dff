"""Seconds, peak memory, operations and utilisation of variants, each in its own process, in turns.

    results = measure({"plain": partial(build, 64)}, Settings(repeats=5))  # build: width, device -> Work

Only one process computes at a time. After the warm-ups the variants take turns, so that other load on the machine hits
all of them. Before each timed call the caches are overwritten and the rate of a large matrix product in the variant's
precision is measured; the call gets inputs that no other call has. Float32 is computed without TF32.

seconds: median over the rounds; ratios are medians of the ratios within a round.
memory: CPU: largest resident set during the timed calls less that after the imports, so weights count; GPU: the
    allocator's largest amount during the calls. None where the system does not tell.
operations: of one call by torch's counter: two per multiply-add in products, convolutions and attention, nothing else.
utilisation: operations / seconds / rate of the best matrix product in this process (a low rate would flatter).
difference: largest absolute difference of its numbers from those of the first variant, on the same input.

`python benchmarks/measure.py` puts the tables of all results into docs/speed.md, with a choice of columns; the .md
files next to the results have all. `--check` writes nothing; exit status 1 if the page differs.
"""

import ctypes
import gc
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tqdm_seg.data.files import write_file
from tqdm_seg.deploy.predict import choose_device
from tqdm_seg.deploy.speed import set_float32_arithmetic, use_huge_pages
from tqdm_seg.program import names, option, parse, run

FLUSH_BYTES = 256 * 2**20  # several times any last-level cache
RESULTS = Path(__file__).parent / "results"
LEFT_OUT = ("least", "most", "GFLOP", "peak MB", "first call s")  # columns
BEGIN, END = "<!-- tables: python benchmarks/measure.py -->", "<!-- end of the tables -->"
CPU = torch.device("cpu")


@dataclass
class Work:
    """A variant that is built; only `call` is timed.

    inputs: number of the call -> its inputs on the device, the same for the same number. dtype: of its matrix products.
    numbers: inputs -> the tensor that is compared between variants. counted: makes the function of the inputs whose
    operations are counted, where the counter cannot look into `call` (compiled, quantised or exported code).
    """

    call: Callable[[Any], Any]
    inputs: Callable[[int], Any]
    dtype: torch.dtype = torch.float32
    numbers: Callable[[Any], Tensor] | None = None
    counted: Callable[[], Callable[[Any], Any]] | None = None
    notes: str = ""


Builder = Callable[[torch.device], Work]  # can be pickled: a function of a module, or a partial of one


@dataclass(kw_only=True)
class Settings:
    """Options of every benchmark of variants."""

    only: tuple[str, ...] | None = option(None, type=names, metavar="A,B", help="run these variants (default: all)")
    repeats: int = option(5, help="timed rounds")
    warm_ups: int | None = option(None, help="calls before them (default: 1 on a CPU, 5 on a GPU)")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="what computes")
    threads: int = option(0, help="CPU threads; 0: torch's default")
    pause: float = option(0.2, help="seconds before a call, in which idle threads settle")
    product_size: int | None = option(None, help="side of the matrix product (default: 2048 on a CPU, 8192 on a GPU)")
    out: Path = option(RESULTS, help="folder of the results")

    def __post_init__(self):
        self.torch_device = torch.device(choose_device(self.device))
        on_cpu = self.torch_device.type == "cpu"
        self.warm_ups = (1 if on_cpu else 5) if self.warm_ups is None else self.warm_ups
        self.product_size = self.product_size or (2048 if on_cpu else 8192)


@dataclass
class Result:
    """Measurements of one variant, see the top of this file; `error` is the traceback of one that failed."""

    name: str
    seconds: float | None = None
    rounds: list[float] = field(default_factory=list)
    memory: int | None = None
    operations: int | None = None
    rate: float | None = None
    utilisation: float | None = None
    difference: float | None = None
    span: tuple[float, float] | None = None  # of the numbers that the others are compared with
    dtype: str = ""
    build_seconds: float | None = None
    warm_up_seconds: list[float] = field(default_factory=list)
    notes: str = ""
    error: str | None = None

    @property
    def last_line(self) -> str:
        return self.error.strip().splitlines()[-1]


def main(program: Callable[[Any], Any], settings: type, description: str) -> None:
    """Runs a benchmark with the options of the command line and exits."""
    sys.exit(run(lambda: program(parse(settings, description, sys.argv[1:]))))


def choose(variants: dict[str, Builder], only: tuple[str, ...] | None) -> dict[str, Builder]:
    """The variants of these names; raises ValueError for unknown names."""
    if unknown := sorted(set(only or ()) - set(variants)):
        raise ValueError(f"no variant {', '.join(unknown)}; choose from {', '.join(variants)}")
    return {name: build for name, build in variants.items() if only is None or name in only}


def seconds_of(call: Callable, *arguments: Any, device: torch.device = CPU) -> float:
    """Wall-clock time of a call until the device is done; its result is freed after the clock."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    start, result = time.perf_counter(), call(*arguments)  # noqa: F841
    wait()
    return time.perf_counter() - start


def take_turns(timers: dict[str, Callable[[], float]], rounds: int) -> list[Result]:
    """For small work inside this process: every timer returns seconds; the first round only warms up."""
    times = [[timer() for timer in timers.values()] for _ in range(rounds + 1)][1:]
    columns = dict(zip(timers, zip(*times, strict=True), strict=True))
    return [Result(name, statistics.median(column), list(column)) for name, column in columns.items()]


def random_images(number: int, count: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """pixel_values (count, 3, H, W), the same for the same number."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(number)).to(device)


def count_operations(call: Callable[[], Any]) -> int:
    """Operations of a call by torch's counter, to which the attention operators of CPUs are added."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    own = {
        attention: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        backward: lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value),
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        call()
    return counter.get_total_flops()


class Worker:
    """A variant inside its process."""

    here: "Worker"  # that of this process

    def __init__(self, build: Builder, settings: Settings):
        Worker.here = self
        use_huge_pages()
        set_float32_arithmetic("fp32")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.builder, self.settings, self.device = build, settings, settings.torch_device
        self.base = psutil.Process().memory_info().rss

    @staticmethod
    def ask(method: str, *arguments: Any) -> Any:
        return getattr(Worker.here, method)(*arguments)

    def prepare(self) -> dict[str, Any]:
        """Builds, with the same random numbers for every variant, and warms up; returns fields of the `Result`."""
        torch.manual_seed(0)
        start = time.perf_counter()
        self.work = self.builder(self.device)
        build_seconds = time.perf_counter() - start
        gc.collect()
        if sys.platform == "linux":
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # glibc: freed memory back to the system
        return {
            "build_seconds": build_seconds, "dtype": str(self.work.dtype).removeprefix("torch."),
            "notes": self.work.notes, "warm_up_seconds": [self.call(n)[0] for n in range(self.settings.warm_ups)],
        }  # fmt: skip

    def call(self, number: int) -> tuple[float, int | None]:
        """Seconds and peak memory of one call."""
        inputs = self.work.inputs(number)
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device).fill_(1)
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats()
            return seconds_of(self.work.call, inputs, device=self.device), torch.accelerator.max_memory_allocated()
        if sys.platform != "linux":  # `resource` only has the peak of the whole life of a process
            return seconds_of(self.work.call, inputs), None
        Path("/proc/self/clear_refs").write_text("5")
        seconds = seconds_of(self.work.call, inputs)
        peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
        return seconds, int(peak[1]) * 1024 - self.base

    def turn(self, number: int) -> tuple[float, int | None, float]:
        """Seconds and peak memory of a call, and the rate of the better of two matrix products before it."""
        size, dtype = self.settings.product_size, self.work.dtype
        factors, multiply = torch.randn(2, size, size, device=self.device).to(dtype), torch.mm
        if dtype == torch.int8:
            factors, multiply = torch.randint(-128, 128, factors.shape, dtype=dtype), torch._int_mm
        seconds = min([seconds_of(multiply, *factors, device=self.device) for _ in range(3)][1:])
        time.sleep(self.settings.pause)
        return *self.call(number), 2 * size**3 / seconds

    def finish(self) -> tuple[np.ndarray | None, int]:
        """What is not timed: numbers, and operations of one call."""
        work = self.work
        numbers = None if work.numbers is None else work.numbers(work.inputs(0)).float().cpu().numpy()
        call = work.call if work.counted is None else work.counted()
        return numbers, count_operations(lambda: call(work.inputs(0)))


class Runner:
    """This side of the process of a variant. After the first failure it answers None to everything."""

    def __init__(self, name: str, build: Builder, settings: Settings):
        self.result, self.turns = Result(name), []
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), Worker, (build, settings))

    def ask(self, method: str, *arguments: Any) -> Any:
        if self.result.error is None:
            try:
                return self.pool.submit(Worker.ask, method, *arguments).result()
            except Exception:
                self.result.error = traceback.format_exc()
                print(f"{self.result.name} failed: {self.result.last_line}", file=sys.stderr, flush=True)
        return None

    def take_turn(self, number: int) -> None:
        """One timed call."""
        if turn := self.ask("turn", number):
            self.turns.append(turn)
            print(f"{self.result.name}: {turn[0]:.3f} s", flush=True)

    def finish(self, wanted: np.ndarray | None) -> np.ndarray | None:
        """The summary; wanted: numbers of the first variant, which returns its own."""
        result, answer = self.result, self.ask("finish")
        self.pool.shutdown()
        if answer is None:
            return wanted
        (numbers, result.operations), (rounds, peaks, rates) = answer, zip(*self.turns, strict=True)
        result.rounds, result.seconds, result.rate = list(rounds), statistics.median(rounds), max(rates)
        result.memory = None if None in peaks else max(peaks)
        result.utilisation = result.operations / result.seconds / result.rate or None
        if numbers is not None and wanted is None:
            result.span = (float(numbers.min()), float(numbers.max()))
        elif numbers is not None:
            result.difference = float(np.abs(numbers - wanted).max())
        return numbers if wanted is None else wanted


def measure(variants: dict[str, Builder], settings: Settings, in_turns: bool = True) -> list[Result]:
    """Measures the variants round by round, or one after the other; those that fail have a traceback as `error`."""
    results, wanted = [], None
    for group in [list(variants)] if in_turns else [[name] for name in variants]:
        runners = [Runner(name, variants[name], settings) for name in group]
        for runner in runners:
            vars(runner.result).update(runner.ask("prepare") or {})
        for number in range(settings.warm_ups, settings.warm_ups + settings.repeats):
            for runner in runners:
                runner.take_turn(number)
        for runner in runners:
            wanted = runner.finish(wanted)
        results += [runner.result for runner in runners]
    return results


# ---- results


def speed_ratio(result: Result, other: Result) -> float | None:
    """How many times faster than the other, the median of the rounds; None if one failed."""
    if result.seconds is None or other.seconds is None:
        return None
    return statistics.median(theirs / mine for mine, theirs in zip(result.rounds, other.rounds, strict=True))


def run_facts(settings: Settings) -> dict[str, Any]:
    """Date, versions, machine, threads and command of this run."""
    gpu, cpuinfo = settings.torch_device.type == "cuda", Path("/proc/cpuinfo")
    processors = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if gpu else settings.torch_device.type,
        "processor": (processors or [platform.processor() or platform.machine()])[0], "cores": os.cpu_count(),
        "threads": settings.threads or torch.get_num_threads(), "torch": torch.__version__,
        "transformers": version("transformers"), "repeats": settings.repeats, "warm_ups": settings.warm_ups,
    }  # fmt: skip


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """First column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(result: Result, baselines: list[Result]) -> dict[str, str]:
    """The row of a variant by column."""
    rounds, first = result.rounds, baselines[0] if baselines else Result("")
    figures = {
        "seconds": (result.seconds, ".3g"), "least": (min(rounds, default=None), ".3g"),
        "most": (max(rounds, default=None), ".3g"),
        **{f"speed / {other.name}'s": (speed_ratio(result, other), ".2f") for other in baselines},
        "GFLOP": (result.operations and result.operations / 1e9, ".4g"), "utilisation": (result.utilisation, ".0%"),
        "peak MB": (result.memory and result.memory / 1e6, ".0f"),
        f"memory / {first.name}'s": (result.memory / first.memory if result.memory and first.memory else None, ".2f"),
        "exact to": (result.difference, ".1e"), "first call s": (next(iter(result.warm_up_seconds), None), ".3g"),
    }  # fmt: skip
    row = {column: "–" if value is None else format(value, form) for column, (value, form) in figures.items()}
    return {"variant": result.name} | row | ({"seconds": f"failed: {result.last_line}"} if result.error else {})


def results_table(results: list[Result], baselines: list[str], leave_out: tuple[str, ...] = ()) -> str:
    """Markdown, without empty columns; baselines: what speed is divided by, where they ran, and memory by the first."""
    by_name = {result.name: result for result in results}
    rows = [cells(result, [by_name[name] for name in baselines if name in by_name]) for result in results]
    header = [key for key in rows[0] if key not in leave_out and any(row[key] != "–" for row in rows)]
    return markdown_table(header, [[row[key] for key in header] for row in rows])


def page_of(suite: dict[str, Any], results: list[Result]) -> str:
    """Title, table, facts and what is to be known of the variants."""
    lines = [
        f"# {suite['title']}",
        results_table(results, suite["baselines"]),
        "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in suite["facts"].items()),
        *(f"Numbers of {r.name} are from {r.span[0]:.3g} to {r.span[1]:.3g}." for r in results if r.span),
        "\n".join(f"- {result.name}: {result.notes}" for result in results if result.notes),
        *(f"{result.name} failed:\n\n```\n{result.error}\n```" for result in results if result.error),
    ]
    return "\n\n".join(filter(None, lines)) + "\n"


def write_pair(out: Path, name: str, content: dict[str, Any], page: str) -> None:
    """OUT/NAME.json and OUT/NAME.md."""
    write_file(out / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    write_file(out / f"{name}.md", page.encode())


def write_results(
    settings: Settings, name: str, title: str, results: list[Result], baselines: list[str], **more: Any
) -> int:
    """Writes JSON and page; more: facts. Returns the exit status: 1 if a variant failed."""
    suite = {"title": title, "baselines": baselines, "facts": run_facts(settings) | more}
    suite["variants"] = [asdict(result) for result in results]
    write_pair(settings.out, name, suite, page_of(suite, results))
    return int(any(result.error is not None for result in results))


# ---- docs/speed.md


@dataclass(kw_only=True)
class TableSettings:
    """Options."""

    check: bool = option(False, help="compare only")
    results: Path = option(RESULTS, help="folder of the results")
    page: Path = option(Path(__file__).parents[1] / "docs" / "speed.md", help="with the markers")


def suite_table(suite: dict[str, Any]) -> str:
    """A caption and a table."""
    facts, results = suite["facts"], [Result(**variant) for variant in suite["variants"]]
    machine = f"{facts['device']} ({facts['threads']} threads), torch {facts['torch']}, medians of {facts['repeats']}"
    return f"{suite['title']}, {machine}:\n\n{results_table(results, suite['baselines'], LEFT_OUT)}"


def write_tables(settings: TableSettings) -> int:
    """Writes or compares; returns the exit status. Raises ValueError if the page has no place for the tables."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(settings.results.glob("*.json"))]
    tables = [suite_table(suite) for suite in files if "variants" in suite]
    changes = settings.results / "mode_changes.md"  # what a mode costs in accuracy
    if changes.is_file():
        tables.append(changes.read_text(encoding="utf-8").removeprefix("# ").strip())
    before, filled = settings.page.read_text(encoding="utf-8"), "\n".join([BEGIN, "\n\n".join(tables), END])
    after, places = re.subn(f"{BEGIN}.*{END}", lambda _: filled, before, flags=re.DOTALL)
    if not places:
        raise ValueError(f"{settings.page} has no place for the tables; add the lines {BEGIN!r} and {END!r}")
    if settings.check and before != after:
        print(f"{settings.page} differs from the results in {settings.results}; run python benchmarks/measure.py")
        return 1
    settings.page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    main(write_tables, TableSettings, __doc__)
