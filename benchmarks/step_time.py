"""Where the time of a training step goes: data, frozen tower, forward, backward, optimiser.

    python benchmarks/step_time.py [--model tiny] [--crop 128] [--batch-size 4] [--steps 20] [--mixed-precision bf16]

Parts are timed one after the other with a wait for the device after each; the whole step is timed without these waits.
On a GPU the whole step runs under torch.cuda.set_sync_debug_mode("error"), which stops at the first operation that
makes the host wait for the device. Medians over the steps, and shares of their sum.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from tqdm_seg.data_tqdm import model_inputs
from tqdm_seg.optimisation_tqdm import parameter_groups, step_counts
from tqdm_seg.reference_tqdm import FrozenReference
from tqdm_seg.train import batch_counts, build_model, open_data, parse_args, train_batches


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="preset or model folder (default: %(default)s)")
    parser.add_argument("--data", default="examples/orfd_mini", help="prepared dataset (default: %(default)s)")
    parser.add_argument("--crop", default="128", help="side in pixels (default: %(default)s)")
    parser.add_argument("--batch-size", default="4", help="images a step (default: %(default)s)")
    parser.add_argument("--workers", default="0", help="loader processes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each kind (default: %(default)s)")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no", help="autocast (%(default)s)")
    own = parser.parse_args()
    words = f"--model {own.model} --data {own.data} --crop {own.crop} --batch-size {own.batch_size}"
    args = parse_args([*words.split(), "--workers", own.workers, "--steps", str(2 * own.steps + 6)])
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    training, _ = open_data(args)
    net, _ = build_model(args, training.classes)
    net = net.to(device).train()
    reference = FrozenReference(net).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(net, args.lr, args.weight_decay, args.vision_lr_mult))
    batches = iter(train_batches(args, training, 0, 0, 1))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=own.mixed_precision == "bf16")
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object], wait: bool = True) -> object:
        start = time.perf_counter()
        result = work()
        if wait and device.type == "cuda":
            torch.cuda.synchronize()
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def step(wait: bool, keep: bool) -> None:
        times_before = {name: list(values) for name, values in times.items()}
        batch = timed("data", lambda: next(batches), wait)
        with autocast:
            inputs = timed("to the device", lambda: model_inputs(batch, device), wait)
            (counts,) = step_counts([batch_counts(batch, net)], device, published=False)
            inputs |= timed("frozen tower", lambda: reference(inputs["pixel_values"]), wait)
            outputs = timed("forward", lambda: net(**inputs, loss_counts=counts, output_logits=False), wait)
        timed("backward", outputs.loss.backward, wait)
        timed("optimiser", update, wait)
        if not keep:
            times.clear()
            times.update(times_before)

    for _ in range(3):
        step(wait=True, keep=False)
    for _ in range(own.steps):
        step(wait=True, keep=True)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    whole = []
    for _ in range(own.steps):
        start = time.perf_counter()
        step(wait=False, keep=False)
        whole.append(time.perf_counter() - start)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()

    medians = {name: statistics.median(values) for name, values in times.items()}
    total = sum(medians.values())
    print(f"{own.model}, {own.batch_size} x {own.crop} px, {own.mixed_precision}, {device}, torch {torch.__version__}")
    for name, value in medians.items():
        print(f"| {name} | {value * 1e3:.1f} ms | {value / total:.1%} |")
    print(f"| sum | {total * 1e3:.1f} ms | 100 % |")
    print(f"| step without waits | {statistics.median(whole) * 1e3:.1f} ms | {statistics.median(whole) / total:.1%} |")


if __name__ == "__main__":
    main()
