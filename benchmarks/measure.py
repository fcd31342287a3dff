"""Seconds, peak memory, operations and utilisation of variants, each in its own process, in turns.

    def build(width: int, device: torch.device) -> Work:  # a function of a module: it runs in another process
        return Work(torch.nn.Linear(width, width).to(device), lambda number: torch.randn(9, width, device=device))

    results = measure({"plain": partial(build, 64)}, Settings(repeats=5))

Only one process computes at a time. After the warm-ups the variants take turns, so that other load on the machine hits
all of them. Before each timed call the caches are overwritten and the rate of a large matrix product in the variant's
precision is measured; the call gets inputs that no other call has.

seconds: median over the rounds; ratios are medians of the ratios within a round.
memory: CPU: largest resident set during the timed calls less that after the imports, so weights count; GPU: the
    allocator's largest amount during the calls. None where the system does not tell.
operations: of one call by torch's counter: two per multiply-add. `NOT_COUNTED` is left out.
utilisation: operations / seconds / rate of the best matrix product in this process (a low rate would flatter).
difference: largest absolute difference of its numbers from those of the first variant, on the same input.
parts: seconds of the parts of a call, which wait for the device, so they are measured after the timed rounds.
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
from concurrent.futures.process import BrokenProcessPool
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

from tqdm_seg.program import names, option, parse, run

NOT_COUNTED = (
    "grid_sample, gather and embedding_bag, interpolation, normalisation, softmax, activations and all other "
    "element-wise work"
)
FLUSH_BYTES = 256 * 2**20  # several times any last-level cache
RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}  # huge pages, as predict and evaluate use them
CPU = torch.device("cpu")


@dataclass
class Work:
    """A variant that is built; only `call` is timed.

    inputs: number of the call -> its inputs on the device, the same for the same number. dtype: of its matrix products.
    numbers: inputs -> the tensor that is compared between variants. counted: makes the function of the inputs whose
    operations are counted, where the counter cannot look into `call` (compiled, quantised or exported code).
    parts: inputs -> seconds of the parts of a call.
    """

    call: Callable[[Any], Any]
    inputs: Callable[[int], Any]
    dtype: torch.dtype = torch.float32
    numbers: Callable[[Any], Tensor] | None = None
    counted: Callable[[], Callable[[Any], Any]] | None = None
    parts: Callable[[Any], dict[str, float]] | None = None
    notes: str = ""


Builder = Callable[[torch.device], Work]  # can be pickled: a function of a module, or a partial of one


@dataclass(kw_only=True)
class Settings:
    """Options of every benchmark of variants."""

    only: tuple[str, ...] | None = option(None, type=names, metavar="A,B", help="run these variants (default: all)")
    repeats: int = option(5, help="timed rounds (default: %(default)s)")
    warm_ups: int | None = option(None, help="calls before them (default: 1 on a CPU, 5 on a GPU)")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="(default: %(default)s)")
    threads: int = option(0, help="CPU threads; 0: torch's default (default: %(default)s)")
    pause: float = option(0.2, help="seconds before a call, in which idle threads settle (default: %(default)s)")
    product_size: int | None = option(None, help="side of the matrix product (default: 2048 on a CPU, 8192 on a GPU)")
    out: Path = option(RESULTS, help="folder of the results (default: %(default)s)")

    def __post_init__(self):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else CPU
        self.torch_device = accelerator if self.device == "auto" else torch.device(self.device)
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
    parts: dict[str, float] = field(default_factory=dict)
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


# ---- one call


class Stopwatch:
    """Seconds by part, waiting for the device after each."""

    def __init__(self, device: torch.device = CPU):
        self.device, self.seconds = device, {}
        self.start = self.now()

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def lap(self, part: str) -> None:
        """Adds the time since the last lap to a part."""
        end = self.now()
        self.seconds[part] = self.seconds.get(part, 0) + end - self.start
        self.start = end


def seconds_of(call: Callable, *arguments: Any, device: torch.device = CPU) -> float:
    """Wall-clock time of a call; its result is freed after the clock."""
    watch, result = Stopwatch(device), call(*arguments)  # noqa: F841
    watch.lap("call")
    return watch.seconds["call"]


def take_turns(timers: dict[str, Callable[[], float]], rounds: int) -> list[Result]:
    """For small work inside this process: every timer returns seconds; the first round only warms up."""
    times = [[timer() for timer in timers.values()] for _ in range(rounds + 1)][1:]
    columns = dict(zip(timers, zip(*times, strict=True), strict=True))
    return [Result(name, statistics.median(column), list(column)) for name, column in columns.items()]


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

    def __init__(self, build: Builder, settings: Settings):
        os.environ.update(ENVIRONMENT)  # read by torch at the first tensor
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.builder, self.settings, self.device = build, settings, settings.torch_device
        self.base = psutil.Process().memory_info().rss

    def build(self) -> dict[str, Any]:
        """Builds the work, with the same random numbers for every variant; returns fields of the `Result`."""
        torch.manual_seed(0)
        watch = Stopwatch(self.device)
        self.work = self.builder(self.device)
        watch.lap("build")
        gc.collect()
        if sys.platform == "linux":
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # glibc: freed memory back to the system
        dtype = str(self.work.dtype).removeprefix("torch.")
        return {"build_seconds": watch.seconds["build"], "dtype": dtype, "notes": self.work.notes}

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

    def rate(self) -> float:
        """Operations per second of the better of two matrix products in the variant's precision."""
        size, dtype = self.settings.product_size, self.work.dtype
        factors, multiply = torch.randn(2, size, size, device=self.device).to(dtype), torch.mm
        if dtype == torch.int8:
            factors, multiply = torch.randint(-128, 128, factors.shape, dtype=dtype), torch._int_mm
        return 2 * size**3 / min([seconds_of(multiply, *factors, device=self.device) for _ in range(3)][1:])

    def finish(self) -> dict[str, Any]:
        """What is not timed: numbers, parts (medians over as many calls as were timed), operations of one call."""
        work, repeats = self.work, range(self.settings.repeats + 1)
        numbers = None if work.numbers is None else work.numbers(work.inputs(0)).float().cpu().numpy()
        runs = [] if work.parts is None else [work.parts(work.inputs(number)) for number in repeats][1:]
        parts = {part: statistics.median(run[part] for run in runs) for part in (runs[0] if runs else ())}
        call = work.call if work.counted is None else work.counted()
        return {"numbers": numbers, "parts": parts, "operations": count_operations(lambda: call(work.inputs(0)))}


def start_worker(build: Builder, settings: Settings) -> None:
    """First call in the process of a variant."""
    global worker
    worker = Worker(build, settings)


def ask_worker(method: str, *arguments: Any) -> tuple[Any, str | None]:
    """(result, None) of a method or (None, traceback), which can always be pickled."""
    try:
        return getattr(worker, method)(*arguments), None
    except Exception:
        return None, traceback.format_exc()


class Runner:
    """This side of the process of a variant. After the first failure it answers None to everything."""

    def __init__(self, name: str, build: Builder, settings: Settings):
        self.result, self.settings = Result(name), settings
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), start_worker, (build, settings))

    def ask(self, method: str, *arguments: Any) -> Any:
        if self.result.error is not None:
            return None
        try:
            answer, self.result.error = self.pool.submit(ask_worker, method, *arguments).result()
        except BrokenProcessPool:
            answer, self.result.error = None, "its process ended abruptly; probably out of memory"
        if self.result.error is not None:
            print(f"{self.result.name} failed: {self.result.last_line}", file=sys.stderr, flush=True)
        return answer

    def prepare(self) -> None:
        """Builds and warms up."""
        vars(self.result).update(self.ask("build") or {})
        calls = [self.ask("call", number) for number in range(self.settings.warm_ups)]
        self.result.warm_up_seconds = [answer[0] for answer in calls if answer]

    def take_turn(self, number: int) -> None:
        """The matrix product, a rest, the timed call."""
        result, rate = self.result, self.ask("rate")
        time.sleep(self.settings.pause)
        if answer := self.ask("call", number):
            seconds, peak = answer
            result.rate = max(rate, result.rate or 0)
            result.rounds.append(seconds)
            result.memory = peak if peak is None else max(peak, result.memory or 0)
            print(f"{result.name}: {seconds:.3f} s", flush=True)

    def finish(self, wanted: np.ndarray | None) -> np.ndarray | None:
        """What is not timed, and the summary; wanted: numbers of the first variant, which returns its own."""
        result, answer = self.result, self.ask("finish")
        if answer is None:
            return wanted
        numbers, result.parts, result.operations = answer["numbers"], answer["parts"], answer["operations"]
        result.seconds = statistics.median(result.rounds)
        result.utilisation = result.operations / result.seconds / result.rate if result.operations else None
        if numbers is not None and wanted is None:
            result.span = (float(numbers.min()), float(numbers.max()))
        elif numbers is not None:
            result.difference = float(np.abs(numbers - wanted).max())
        return numbers if wanted is None else wanted


def measure(variants: dict[str, Builder], settings: Settings, in_turns: bool = True) -> list[Result]:
    """Measures the variants round by round, or one after the other where together they would not fit the memory.

    A variant that fails leaves its traceback in `Result.error`, and the others go on without it.
    """
    results, wanted = [], None
    for group in [list(variants)] if in_turns else [[name] for name in variants]:
        runners = [Runner(name, variants[name], settings) for name in group]
        for runner in runners:
            runner.prepare()
        for number in range(settings.warm_ups, settings.warm_ups + settings.repeats):
            for runner in runners:
                runner.take_turn(number)
        for runner in runners:
            wanted = runner.finish(wanted)
            runner.pool.shutdown()
            results.append(runner.result)
    return results


# ---- results


def speed_ratio(result: Result, other: Result) -> tuple[float, float, float] | None:
    """How many times faster than the other: median, least and most of the rounds."""
    if result.seconds is None or other.seconds is None:
        return None
    ratios = [theirs / mine for mine, theirs in zip(result.rounds, other.rounds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def run_facts(settings: Settings) -> dict[str, Any]:
    """Date, versions, machine, threads and command of this run."""
    gpu, cpuinfo = settings.torch_device.type == "cuda", Path("/proc/cpuinfo")
    processors = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    tf32 = {"products": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if gpu else settings.torch_device.type,
        "processor": (processors or [platform.processor() or platform.machine()])[0], "cores": os.cpu_count(),
        "threads": settings.threads or torch.get_num_threads(), "torch": torch.__version__,
        "transformers": version("transformers"),
        "tf32": ", ".join(use for use, allowed in tf32.items() if allowed and gpu) or "none",
        "environment": ENVIRONMENT, "repeats": settings.repeats, "order": "in which the variants took turns",
        "warm_ups": settings.warm_ups, "not_counted": NOT_COUNTED,
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
        **{f"speed / {other.name}'s": ((speed_ratio(result, other) or [None])[0], ".2f") for other in baselines},
        "GFLOP": (result.operations and result.operations / 1e9, ".4g"), "utilisation": (result.utilisation, ".0%"),
        "peak MB": (result.memory and result.memory / 1e6, ".0f"),
        f"memory / {first.name}'s": (result.memory / first.memory if result.memory and first.memory else None, ".2f"),
        "exact to": (result.difference, ".1e"), "first call s": (next(iter(result.warm_up_seconds), None), ".3g"),
    }  # fmt: skip
    row = {column: "–" if value is None else format(value, form) for column, (value, form) in figures.items()}
    return {"variant": result.name} | row | ({"seconds": f"failed: {result.last_line}"} if result.error else {})


def results_table(results: list[Result], baselines: list[str], leave_out: tuple[str, ...] = ()) -> str:
    """Markdown, without empty columns; baselines: what speed is divided by, and memory by the first.

    Baselines that were not run have no column.
    """
    by_name = {result.name: result for result in results}
    rows = [cells(result, [by_name[name] for name in baselines if name in by_name]) for result in results]
    header = [key for key in rows[0] if key not in leave_out and any(row[key] != "–" for row in rows)]
    return markdown_table(header, [[row[key] for key in header] for row in rows])


def parts_table(results: list[Result], quoted: dict[str, float] | None = None) -> str:
    """Seconds and share of every part of a call. quoted: of the published code itself."""
    rows, note = {result.name: result.parts for result in results if result.parts}, ""
    if not rows:
        return ""
    parts = next(iter(rows.values()))
    if quoted:
        rows["published code (quoted)"] = quoted
        note = "\n\nThe published code was measured once, on another machine, with torch 2.13 and 2 threads: quoted."
    table = [
        [name, *(f"{row[part]:.3g} ({row[part] / sum(row.values()):.0%})" if part in row else "–" for part in parts)]
        for name, row in rows.items()
    ]
    return markdown_table(["seconds (share)", *parts], table) + note


def page_of(title: str, results: list[Result], baselines: list[str], facts: dict[str, Any], remarks: str) -> str:
    """Title, table, facts and what is to be known of the variants."""
    rates: dict[str, float] = {}
    for result in results:
        rates[result.dtype] = max(result.rate or 0, rates.get(result.dtype, 0))
    products = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items() if rate)
    lines = [
        f"# {title}",
        results_table(results, baselines),
        f"{facts['date']}, {facts['device']} ({facts['processor']}, {facts['threads']} of {facts['cores']} threads), "
        f"torch {facts['torch']}, transformers {facts['transformers']}. Medians of {facts['repeats']} rounds, "
        f"{facts['order']}, after {facts['warm_ups']} to warm up; ratios are medians over the rounds. "
        f"Operations do not include {facts['not_counted']}. Matrix products: {products or 'not measured'}. "
        f"TF32: {facts['tf32']}. For all: {' '.join(f'{k}={v}' for k, v in facts['environment'].items())}.",
        f"`{facts['command']}`",
        *(
            f"Exact to: largest difference from {result.name}'s numbers, which lie between {result.span[0]:.3g} and "
            f"{result.span[1]:.3g}."
            for result in results
            if result.span is not None
        ),
        "\n".join(f"- {result.name}: {result.notes}" for result in results if result.notes),
        *(f"{result.name} failed:\n\n```\n{result.error}\n```" for result in results if result.error),
        remarks,
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def write_results(
    settings: Settings,
    name: str,
    title: str,
    results: list[Result],
    baselines: list[str],
    remarks: str = "",
    **more: Any,
) -> int:
    """OUT/NAME.json and OUT/NAME.md; more: facts. Returns the exit status: 1 if a variant failed."""
    facts = run_facts(settings) | more
    suite = {"title": title, "baselines": baselines, "facts": facts, "variants": [asdict(result) for result in results]}
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / f"{name}.json").write_text(json.dumps(suite, indent=1) + "\n", encoding="utf-8")
    (settings.out / f"{name}.md").write_text(page_of(title, results, baselines, facts, remarks), encoding="utf-8")
    return int(any(result.error is not None for result in results))
