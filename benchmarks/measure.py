"""Contenders beside each other: seconds, peak memory, operations and utilisation, each in a process of its own.

A suite is a list of `Contender`s, given to `measure`, whose results `write_results` puts on disk:

    def build(width: int, device: torch.device) -> Work:      # a module-level function: it runs in the other process
        layer = torch.nn.Linear(width, width).to(device)
        return Work(call=layer, inputs=lambda number: torch.randn(9, width, device=device))

    settings = Settings(repeats=5)
    results = measure([Contender("plain", partial(build, 64))], settings, compare_with="plain")
    write_results(RESULTS, "layer", "A linear layer", results, ["plain"], run_facts(settings))
    sys.exit(exit_status(results))

Every process stays alive and only one computes at a time. After the warm-ups they take turns, round by round, so that
other load on the machine hits all alike. Before each timed call the caches are overwritten, the call gets inputs that
were made for it alone, and the rate of a large matrix product in the contender's precision is measured beside it.

What is reported of each contender:
seconds: median over the rounds, with all of them beside it; the device is waited for before and after every call.
memory: CPU: largest resident set during the timed calls less that after the imports, before anything was built (so
    weights count); GPU: the allocator's largest amount during the calls. None where the system does not tell.
operations: of one call by torch's counter, attention included: two per multiply-add of matrix products, convolutions
    and attention. `NOT_COUNTED` says what it does not see.
rate: operations per second of the largest of all matrix products of the run in this process and precision (the best
    one, not the median: a low rate would flatter).
utilisation: operations / seconds / rate.
difference: largest absolute difference of its numbers from those of `compare_with`, on the same input; span: where the
    numbers of `compare_with` lie, so that the difference says something.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

NOT_COUNTED = (
    "grid_sample, gather and embedding_bag, interpolation, normalisation, softmax, activations and all other "
    "element-wise work"
)
FLUSH_BYTES = 256 * 2**20  # several times any last-level cache
RESULTS = Path(__file__).parent / "results"
# Of every contender's process: huge pages, as predict.py and evaluate_tqdm.py have them.
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}


@dataclass
class Work:
    """What a contender does once it is built.

    call: inputs -> anything; the only part that is timed.
    inputs: number of the call -> its inputs, on the device; the same number gives every contender the same numbers.
    dtype: of its matrix products, in which the rate is measured.
    numbers: inputs -> tensor that is compared with the other contenders', or none.
    counted: makes what is counted instead of `call` where the counter cannot look into that (compiled, quantised or
    exported code): a function of the inputs. Called after everything else, so it may take memory.
    notes: what the reader should know about this contender.
    """

    call: Callable[[Any], Any]
    inputs: Callable[[int], Any]
    dtype: torch.dtype = torch.float32
    numbers: Callable[[Any], Tensor] | None = None
    counted: Callable[[], Callable[[Any], Any]] | None = None
    notes: str = ""


@dataclass
class Contender:
    """A name and the function that builds its `Work` on a device; picklable: a function of a module, or a partial."""

    name: str
    build: Callable[[torch.device], Work]


@dataclass
class Settings:
    """device: "cpu", "cuda" or "auto". threads: 0 leaves torch's own number. pause: seconds of rest before a call.

    warm_ups: calls before the timed ones, None: 1 on a CPU, 5 on a GPU. product_size: side of the matrix product, 0:
    2048 on a CPU, 8192 on a GPU.
    """

    repeats: int = 5
    warm_ups: int | None = None
    device: str = "auto"
    threads: int = 0
    pause: float = 0.2  # the idle threads of the contender before spin for a moment
    product_size: int = 0

    def __post_init__(self):
        on_cpu = find_device(self.device).type == "cpu"
        if self.warm_ups is None:
            self.warm_ups = 1 if on_cpu else 5
        if self.product_size == 0:
            self.product_size = 2048 if on_cpu else 8192


@dataclass
class Result:
    """What was measured of one contender, see the top of this file; error holds the traceback of one that failed."""

    name: str
    seconds: float | None = None
    rounds: list[float] = field(default_factory=list)
    memory: int | None = None
    operations: int | None = None
    rate: float | None = None
    utilisation: float | None = None
    difference: float | None = None
    span: tuple[float, float] | None = None
    dtype: str = ""
    build_seconds: float | None = None
    warm_up_seconds: list[float] = field(default_factory=list)
    notes: str = ""
    error: str | None = None


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is the accelerator, if there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def status_bytes(name: str) -> int | None:
    """VmRSS, VmHWM ... of this process in bytes; none where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def reset_peak(device: torch.device) -> None:
    """From here on `peak_memory` counts anew."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device, base: int | None) -> int | None:
    """Bytes, see the top of this file; base: the resident set before anything was built."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    peak = status_bytes("VmHWM")
    return None if peak is None or base is None else peak - base


def release_memory() -> None:
    """Gives what Python and the C library keep for later back to the system, so that it is not taken for used."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # glibc has it, musl does not


def flush_caches(device: torch.device) -> None:
    """Overwrites the caches, so that no call finds its inputs or weights there."""
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).fill_(1)


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations per second of the better of two products of (size, size) matrices; int8 sums up in int32."""
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, (size, size), dtype=dtype, device=device) for _ in range(2))
    else:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    seconds = []
    for _ in range(3):
        synchronise(device)
        start = time.perf_counter()
        multiply(a, b)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def count_operations(call: Callable[[], Any]) -> int:
    """Operations of a call by torch's counter, which by itself leaves out the attention operator of CPUs."""

    def attention(query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(grad: tuple, query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    own = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        call()
    return counter.get_total_flops()


class Worker:
    """A contender inside its process; `serve` calls these methods by name."""

    def __init__(self, contender: Contender, settings: Settings):
        self.contender, self.settings = contender, settings
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.device = find_device(settings.device)
        self.base = status_bytes("VmRSS")

    def ready(self) -> None:
        """Answers once the imports are done, so that no building is timed beside them."""

    def build(self) -> dict[str, Any]:
        """Builds the work, from the same random numbers for every contender, and takes its facts for the `Result`."""
        torch.manual_seed(0)
        start = time.perf_counter()
        self.work = self.contender.build(self.device)
        synchronise(self.device)
        seconds = time.perf_counter() - start
        release_memory()
        dtype = str(self.work.dtype).removeprefix("torch.")
        return {"build_seconds": seconds, "dtype": dtype, "notes": self.work.notes}

    def call(self, number: int) -> tuple[float, int | None]:
        """Seconds and peak memory of one call."""
        inputs = self.work.inputs(number)
        flush_caches(self.device)
        gc.collect()
        synchronise(self.device)
        reset_peak(self.device)
        start = time.perf_counter()
        result = self.work.call(inputs)
        synchronise(self.device)
        seconds = time.perf_counter() - start
        memory = peak_memory(self.device, self.base)
        del result
        return seconds, memory

    def rate(self) -> float:
        """Operations per second of a matrix product in the contender's precision."""
        return product_rate(self.device, self.work.dtype, self.settings.product_size)

    def operations(self) -> int:
        """Of one call."""
        call = self.work.call if self.work.counted is None else self.work.counted()
        return count_operations(lambda: call(self.work.inputs(0)))

    def numbers(self, path: Path) -> bool:
        """Writes what the contenders are compared by; False if it has nothing of the kind."""
        if self.work.numbers is None:
            return False
        torch.save(self.work.numbers(self.work.inputs(0)).float().cpu(), path)
        return True


def serve(pipe: Connection, contender: Contender, settings: Settings) -> None:
    """The process of a contender: does one request after the other, and answers (result, None) or (None, traceback)."""
    os.environ.update(ENVIRONMENT)  # torch reads it at the first tensor
    worker = Worker(contender, settings)
    while (request := pipe.recv()) is not None:
        name, *arguments = request
        try:
            pipe.send((getattr(worker, name)(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


class Runner:
    """The near end of a contender's process. After its first failure it is asked nothing more."""

    def __init__(self, contender: Contender, settings: Settings):
        self.result = Result(contender.name)
        self.peaks: list[int | None] = []
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=serve, args=(far, contender, settings), daemon=True)
        self.process.start()
        far.close()  # so that the end of the process ends the pipe

    def ask(self, name: str, *arguments: Any) -> Any:
        """The answer, or none from a contender that has failed."""
        if self.result.error is not None:
            return None
        try:
            self.pipe.send((name, *arguments))
            answer, self.result.error = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            self.result.error = f"its process ended with exit code {self.process.exitcode} (-9: out of memory?)"
            answer = None
        if self.result.error is not None:
            print(f"{self.result.name} failed: {last_line(self.result.error)}", file=sys.stderr, flush=True)
        return answer

    def close(self) -> None:
        """Ends the process."""
        if self.process.is_alive() and self.result.error is None:
            self.pipe.send(None)
            self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()


def last_line(error: str) -> str:
    """Of a traceback: what went wrong."""
    return error.strip().splitlines()[-1]


def measure(contenders: list[Contender], settings: Settings, compare_with: str | None = None) -> list[Result]:
    """Builds, warms up and times the contenders round by round; compares the numbers with those of the one named.

    A contender that fails leaves its traceback in `Result.error`, and the others go on without it.
    """
    names = [contender.name for contender in contenders]
    if compare_with is not None and compare_with not in names:
        raise ValueError(f"compare_with {compare_with!r} is none of the contenders: {', '.join(names)}")
    runners = [Runner(contender, settings) for contender in contenders]
    try:
        for runner in runners:
            runner.ask("ready")
        for runner in runners:
            for key, value in (runner.ask("build") or {}).items():
                setattr(runner.result, key, value)
            for number in range(settings.warm_ups):
                if answer := runner.ask("call", number):
                    runner.result.warm_up_seconds.append(answer[0])
        for number in range(settings.warm_ups, settings.warm_ups + settings.repeats):
            for runner in runners:
                time_once(runner, number, settings)
        if compare_with is not None:
            compare(runners, next(runner for runner in runners if runner.result.name == compare_with))
        for runner in runners:
            runner.result.operations = runner.ask("operations")
    finally:
        for runner in runners:
            runner.close()
    for runner in runners:
        summarise(runner)
    return [runner.result for runner in runners]


def time_once(runner: Runner, number: int, settings: Settings) -> None:
    """One turn: the matrix product, a rest, the timed call."""
    result = runner.result
    rate = runner.ask("rate")
    time.sleep(settings.pause)
    answer = runner.ask("call", number)
    if answer is not None:
        result.rate = max(rate, result.rate or 0)
        result.rounds.append(answer[0])
        runner.peaks.append(answer[1])
        print(f"{result.name}: {answer[0]:.3f} s", flush=True)


def compare(runners: list[Runner], reference: Runner) -> None:
    """Fills in the `difference` of each runner from the reference, and the `span` of the reference."""
    with tempfile.TemporaryDirectory() as folder:
        wanted_file, found_file = Path(folder) / "wanted.pt", Path(folder) / "found.pt"
        if not reference.ask("numbers", wanted_file):
            return
        wanted = torch.load(wanted_file)
        reference.result.span = (wanted.min().item(), wanted.max().item())
        for runner in runners:
            if runner is reference or not runner.ask("numbers", found_file):
                continue
            found = torch.load(found_file)
            if found.shape != wanted.shape:
                runner.result.error = f"its numbers are {tuple(found.shape)} and the reference's {tuple(wanted.shape)}"
                continue
            runner.result.difference = (found - wanted).abs().max().item()


def summarise(runner: Runner) -> None:
    """Median, peak and utilisation from the single calls; a contender that failed keeps none of them."""
    result = runner.result
    if result.error is not None or not result.rounds:
        return
    result.seconds = statistics.median(result.rounds)
    known = [peak for peak in runner.peaks if peak is not None]
    result.memory = max(known) if known else None
    if result.operations:
        result.utilisation = utilisation(result.operations, result.seconds, result.rate)


def utilisation(operations: int, seconds: float, rate: float) -> float:
    """Share of the matrix-product rate that was reached."""
    return operations / seconds / rate


def speed_ratio(result: Result, other: Result) -> tuple[float, float, float] | None:
    """How many times faster than the other: median, least and most of the rounds, both of the same round."""
    if result.seconds is None or other.seconds is None:
        return None
    ratios = [theirs / mine for mine, theirs in zip(result.rounds, other.rounds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def tf32_use(device: torch.device) -> str:
    """Which float32 work a GPU may round to TF32, by torch's settings."""
    if device.type != "cuda":
        return "none"
    used = {"products": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32}
    return ", ".join(name for name, allowed in used.items() if allowed) or "none"


def run_facts(settings: Settings) -> dict[str, Any]:
    """Date, versions, machine, threads and command of this run."""
    device = find_device(settings.device)
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": settings.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "tf32": tf32_use(device),
        "environment": ENVIRONMENT,
        "repeats": settings.repeats,
        "order": "in which the contenders took turns",
        "warm_ups": settings.warm_ups,
        "not_counted": NOT_COUNTED,
    }


def results_table(results: list[Result], baselines: list[str]) -> str:
    """A Markdown table; baselines: contenders that the others' speed, and of the first one the memory, is divided by.

    A baseline that was not run leaves its column empty.
    """
    by_name = {result.name: result for result in results}
    references = [by_name.get(name, Result(name)) for name in baselines]
    header = ["contender", "seconds (least to most)", *(f"speed / {name}'s" for name in baselines)]
    header += ["GFLOP", "utilisation", "peak MB", f"MB / {baselines[0]}'s", "exact to", "first call s"]
    rows = []
    for result in results:
        if result.seconds is None:
            rows.append([result.name, f"failed: {last_line(result.error)}", *["–"] * (len(header) - 2)])
            continue
        ratios = [speed_ratio(result, reference) for reference in references]
        known = result.memory is not None and references[0].memory
        rows.append(
            [
                result.name,
                f"{result.seconds:.3g} ({min(result.rounds):.3g} to {max(result.rounds):.3g})",
                *(shown(ratio and ratio[0], ".2f") for ratio in ratios),
                shown(result.operations and result.operations / 1e9, ".4g"),
                shown(result.utilisation, ".0%"),
                shown(result.memory and result.memory / 1e6, ".0f"),
                shown(result.memory / references[0].memory if known else None, ".2f"),
                shown(result.difference, ".1e"),
                shown(result.warm_up_seconds[0] if result.warm_up_seconds else None, ".3g"),
            ]
        )
    return markdown_table(header, rows)


def best_rates(results: list[Result]) -> str:
    """The best matrix product of each precision in words."""
    best: dict[str, float] = {}
    for result in results:
        if result.rate is not None:
            best[result.dtype] = max(result.rate, best.get(result.dtype, 0))
    return ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in best.items())


def results_markdown(title: str, results: list[Result], baselines: list[str], facts: dict[str, Any]) -> str:
    """The page of a suite: title, table, what the run was and what is to be known of the contenders."""
    lines = [
        f"# {title}",
        results_table(results, baselines),
        f"{facts['date']}, {facts['device']} ({facts['processor']}, {facts['threads']} of {facts['cores']} threads), "
        f"torch {facts['torch']}, transformers {facts['transformers']}. Medians of {facts['repeats']} rounds, "
        f"{facts['order']}, after {facts['warm_ups']} to warm up; ratios are medians over the rounds. "
        f"Operations do not include {facts['not_counted']}. Matrix products: {best_rates(results)}. "
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
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """First column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: float | None, form: str) -> str:
    """A figure in this format, or a dash for none."""
    return "–" if value is None else format(value, form)


def write_results(
    folder: Path,
    name: str,
    title: str,
    results: list[Result],
    baselines: list[str],
    facts: dict[str, Any],
    remarks: str = "",
) -> None:
    """FOLDER/NAME.json and FOLDER/NAME.md; facts: of `run_facts`, with what the suite adds; remarks: more Markdown."""
    from tqdm_seg.data.files import write_whole

    contenders = [asdict(result) for result in results]
    suite = {"title": title, "baselines": baselines, "facts": facts, "contenders": contenders}
    page = results_markdown(title, results, baselines, facts) + (f"\n{remarks}\n" if remarks else "")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.json", (json.dumps(suite, indent=1) + "\n").encode())
    write_whole(folder / f"{name}.md", page.encode())


def exit_status(results: list[Result]) -> int:
    """1 if a contender failed."""
    return int(any(result.error is not None for result in results))
