"""Seconds, peak memory, operations and utilisation of variants, each in its own process, in turns.

    def build(width: int, device: torch.device) -> Work:  # a function of a module: it runs in another process
        layer = torch.nn.Linear(width, width).to(device)
        return Work(layer, inputs=lambda number: torch.randn(9, width, device=device))

    results = measure({"plain": partial(build, 64)}, settings := Settings(repeats=5))
    write_results(settings, "layer", "A linear layer", results, baselines=["plain"])

Only one process computes at a time. After the warm-ups the variants take turns, so that other load on the machine hits
all of them. Before each timed call the caches are overwritten and the rate of a large matrix product in the variant's
precision is measured; the call gets inputs that no other call has.

seconds: median over the rounds; ratios are medians of the ratios within a round.
memory: CPU: largest resident set during the timed calls less that after the imports, so weights count; GPU: the
    allocator's largest amount during the calls. None where the system does not tell.
operations: of one call by torch's counter: two per multiply-add. `NOT_COUNTED` is left out.
utilisation: operations / seconds / rate, the best matrix product in this process (a low rate would flatter).
difference: largest absolute difference of its numbers from those of the first variant, on the same input.
parts: seconds of the parts of a call, which wait for the device, so they are measured after the timed rounds.
"""

import ctypes
import gc
import json
import os
import platform
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
        on_cpu = self.torch_device.type == "cpu"
        self.warm_ups = (1 if on_cpu else 5) if self.warm_ups is None else self.warm_ups
        self.product_size = self.product_size or (2048 if on_cpu else 8192)

    @property
    def torch_device(self) -> torch.device:
        if self.device == "auto" and torch.accelerator.is_available():
            return torch.accelerator.current_accelerator()
        return torch.device(self.device.replace("auto", "cpu"))


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


def seconds_of(call: Callable[[], Any], device: torch.device = CPU) -> float:
    """Wall-clock time of a call; its result is freed after the clock."""
    watch, result = Stopwatch(device), call()  # noqa: F841
    return watch.now() - watch.start


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
        seconds = watch.now() - watch.start
        gc.collect()
        if sys.platform == "linux":
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # glibc: freed memory back to the system
        dtype = str(self.work.dtype).removeprefix("torch.")
        return {"build_seconds": seconds, "dtype": dtype, "notes": self.work.notes}

    def call(self, number: int) -> tuple[float, int | None]:
        """Seconds and peak memory of one call."""
        inputs, on_cpu, memory = self.work.inputs(number), self.device.type == "cpu", None
        torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device).fill_(1)
        gc.collect()
        if not on_cpu:
            torch.accelerator.reset_peak_memory_stats()
        elif sys.platform == "linux":  # `resource` only has the peak of the whole life of a process
            Path("/proc/self/clear_refs").write_text("5")
        seconds = seconds_of(lambda: self.work.call(inputs), self.device)
        if not on_cpu:
            memory = torch.accelerator.max_memory_allocated()
        elif sys.platform == "linux":
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            memory = int(status["VmHWM"].split()[0]) * 1024 - self.base
        return seconds, memory

    def rate(self) -> float:
        """Operations per second of the better of two matrix products in the variant's precision."""
        size, dtype = self.settings.product_size, self.work.dtype
        if dtype == torch.int8:
            a, b = torch.randint(-128, 128, (2, size, size), dtype=dtype, device=self.device)
        else:
            a, b = torch.randn(2, size, size, device=self.device).to(dtype)
        multiply = torch._int_mm if dtype == torch.int8 else torch.mm
        return 2 * size**3 / min([seconds_of(lambda: multiply(a, b), self.device) for _ in range(3)][1:])

    def numbers(self) -> np.ndarray | None:
        return None if self.work.numbers is None else self.work.numbers(self.work.inputs(0)).float().cpu().numpy()

    def parts(self) -> dict[str, float]:
        """Medians over as many calls as were timed."""
        if self.work.parts is None:
            return {}
        runs = [self.work.parts(self.work.inputs(number)) for number in range(self.settings.repeats + 1)][1:]
        return {part: statistics.median(run[part] for run in runs) for part in runs[0]}

    def operations(self) -> int:
        call = self.work.call if self.work.counted is None else self.work.counted()
        return count_operations(lambda: call(self.work.inputs(0)))


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
        for key, value in (self.ask("build") or {}).items():
            setattr(self.result, key, value)
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
        """Everything that is not timed; wanted: numbers of the first variant, which returns its own."""
        result, numbers = self.result, self.ask("numbers")
        if numbers is not None and wanted is None:
            result.span = (float(numbers.min()), float(numbers.max()))
        elif numbers is not None:
            result.difference = float(np.abs(numbers - wanted).max())
        result.parts = self.ask("parts") or {}
        result.operations = self.ask("operations")
        if result.error is None and result.rounds:
            result.seconds = statistics.median(result.rounds)
            result.utilisation = result.operations / result.seconds / result.rate if result.operations else None
        return numbers if wanted is None else wanted


def measure(variants: dict[str, Builder], settings: Settings, in_turns: bool = True) -> list[Result]:
    """Measures the variants round by round, or one after the other where together they would not fit the memory.

    A variant that fails leaves its traceback in `Result.error`, and the others go on without it.
    """
    results, wanted = [], None
    for group in [list(variants)] if in_turns else [[name] for name in variants]:
        runners = [Runner(name, variants[name], settings) for name in group]
        try:
            for runner in runners:
                runner.prepare()
            for number in range(settings.warm_ups, settings.warm_ups + settings.repeats):
                for runner in runners:
                    runner.take_turn(number)
            for runner in runners:
                wanted = runner.finish(wanted)
        finally:
            for runner in runners:
                runner.pool.shutdown()
        results += [runner.result for runner in runners]
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
    gpu = settings.torch_device.type == "cuda"
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    tf32 = {"products": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if gpu else settings.torch_device.type,
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": settings.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "tf32": ", ".join(use for use, allowed in tf32.items() if allowed and gpu) or "none",
        "environment": ENVIRONMENT,
        "repeats": settings.repeats,
        "order": "in which the variants took turns",
        "warm_ups": settings.warm_ups,
        "not_counted": NOT_COUNTED,
    }


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """First column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(result: Result, baselines: list[Result]) -> dict[str, str]:
    """The row of a variant by column."""

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    row = {"variant": result.name, "seconds": shown(result.seconds, ".3g"), "least to most": "–"}
    if result.error is not None:
        row["seconds"] = f"failed: {result.last_line}"
    elif result.rounds:
        row["least to most"] = f"{min(result.rounds):.3g} to {max(result.rounds):.3g}"
    for other in baselines:
        row[f"speed / {other.name}'s"] = shown((speed_ratio(result, other) or [None])[0], ".2f")
    row["GFLOP"] = shown(result.operations and result.operations / 1e9, ".4g")
    row["utilisation"] = shown(result.utilisation, ".0%")
    row["peak MB"] = shown(result.memory and result.memory / 1e6, ".0f")
    for other in baselines[:1]:
        ratio = result.memory / other.memory if result.memory and other.memory else None
        row[f"memory / {other.name}'s"] = shown(ratio, ".2f")
    row["exact to"] = shown(result.difference, ".1e")
    row["first call s"] = shown(next(iter(result.warm_up_seconds), None), ".3g")
    return row


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
        if result.rate is not None:
            rates[result.dtype] = max(result.rate, rates.get(result.dtype, 0))
    products = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items())
    lines = [
        f"# {title}",
        results_table(results, baselines),
        f"{facts['date']}, {facts['device']} ({facts['processor']}, {facts['threads']} of {facts['cores']} threads), "
        f"torch {facts['torch']}, transformers {facts['transformers']}. Medians of {facts['repeats']} rounds, "
        f"{facts['order']}, after {facts['warm_ups']} to warm up; ratios are medians over the rounds. "
        f"Operations do not include {facts['not_counted']}. Matrix products: {products or 'not measured'}. "
        f"TF32: {facts['tf32']}. For all: {' '.join(f'{k}={v}' for k, v in facts['environment'].items())}.",
        f"`{facts['command']}`",
        "\n".join(
            f"Exact to: largest difference from {result.name}'s numbers, which lie between {result.span[0]:.3g} and "
            f"{result.span[1]:.3g}."
            for result in results
            if result.span is not None
        ),
        "\n".join(f"- {result.name}: {result.notes}" for result in results if result.notes),
        "\n\n".join(f"{result.name} failed:\n\n```\n{result.error}\n```" for result in results if result.error),
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
