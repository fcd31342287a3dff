"""The benchmarks measure what they say, and the published order of work gives the model's numbers."""

import json
import re
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import data_speed
import inference_speed
import pytest
import torch
from benchmark_variants import build_failing, build_linear
from conftest import micro_model
from measure import (
    BEGIN,
    END,
    RESULTS,
    Result,
    Settings,
    TableSettings,
    choose,
    count_operations,
    measure,
    results_table,
    speed_ratio,
    write_results,
    write_tables,
)
from published import PublishedOrder
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(repeats=2, device="cpu", threads=1, pause=0, product_size=64)


# ---- the published order of work


@pytest.mark.parametrize("size", [(32, 32), (50, 70), (24, 40)])
def test_the_published_order_gives_the_scores_of_the_model(model, size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    for parameter in model.parameters():  # the zeros of a new model would hide what is left out
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    expected = model.segment(images)
    order = PublishedOrder(model)
    torch.testing.assert_close(order.scores(images), expected, atol=1e-4, rtol=0)
    assert torch.equal(order(images), expected.argmax(1))


def test_the_published_order_does_its_work_in_every_window(monkeypatch):
    model = micro_model(pixel_decoder_layers=2)
    calls = []
    encode, decoder = model.model.text_queries.encode, model.model.mask_decoder
    monkeypatch.setattr(model.model.text_queries, "encode", lambda: calls.append("text") or encode())
    decoder.class_head.register_forward_hook(lambda *_: calls.append("prediction"))
    model.model.pixel_decoder.post_norm.register_forward_hook(lambda *_: calls.append("norm"))
    PublishedOrder(model)(torch.randn(1, 3, 32, 52))
    assert calls.count("text") == 2 and calls.count("prediction") == 2 * (1 + 2) and calls.count("norm") == 2 * 2


# ---- measuring


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """Two layers, one of which holds 200 MB, and two variants that fail."""
    variants = {
        "light": partial(build_linear, 0.0, 0), "heavy": partial(build_linear, 0.25, 200),
        "wrong": partial(build_failing, 2), "gone": partial(build_failing, -1),
    }  # fmt: skip
    return {result.name: result for result in measure(variants, SETTINGS)}


@pytest.mark.slow
def test_memory_is_what_a_variant_holds(results):
    if results["light"].memory is None:
        pytest.skip("this system has no /proc")
    assert 190e6 < results["heavy"].memory - results["light"].memory < 215e6


@pytest.mark.slow
def test_operations_medians_and_utilisation(results):
    light = results["light"]
    assert len(light.rounds) == 2 and light.seconds == sum(light.rounds) / 2 and len(light.warm_up_seconds) == 1
    assert light.operations == 2 * 8 * 32 * 32 and light.dtype == "float32"
    assert light.utilisation == pytest.approx(light.operations / light.seconds / light.rate)


@pytest.mark.slow
def test_numbers_are_compared_on_the_same_weights_and_input(results):
    assert results["light"].difference is None and results["light"].span is not None
    assert results["heavy"].difference == pytest.approx(0.25, abs=1e-6)


@pytest.mark.slow
def test_a_failure_is_reported_and_the_others_go_on(results, tmp_path):
    assert "ValueError: call 2 is wrong" in results["wrong"].error and results["wrong"].seconds is None
    assert results["gone"].error and results["gone"].seconds is None
    assert results["light"].error is None and results["heavy"].error is None
    table = results_table(list(results.values()), ["light", "absent"])
    assert "call 2 is wrong" in table and "| light | " in table and "absent" not in table
    settings = Settings(device="cpu", out=tmp_path)
    assert write_results(settings, "all", "All", list(results.values()), ["light"]) == 1
    assert write_results(settings, "light", "Light", [results["light"]], ["light"]) == 0


def test_ratios_are_of_the_same_round():
    slow, fast = Result("slow", 3.0, [2.0, 3.0, 8.0]), Result("fast", 1.0, [1.0, 1.0, 2.0])
    assert speed_ratio(fast, slow) == 3.0 and speed_ratio(slow, Result("failed", error="x")) is None


def test_attention_is_counted():
    q = torch.randn(1, 2, 64, 16)
    wanted = 2 * (2 * 2 * 64 * 64 * 16)  # two products, two heads
    with torch.inference_mode():
        assert count_operations(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == wanted


def test_an_unknown_variant_is_an_error():
    with pytest.raises(ValueError, match=r"magic.*plain"):
        choose({"plain": partial(build_linear, 0.0, 0)}, ("magic",))


# ---- the programs


@pytest.mark.slow
def test_inference_is_measured_from_end_to_end(tmp_path, capsys):
    settings = inference_speed.InferenceSettings(
        preset="tiny", size=((64, 96),), only=("published-order", "ours-exact"), repeats=1, device="cpu", threads=1,
        pause=0, product_size=64, out=tmp_path,
    )  # fmt: skip
    assert inference_speed.measure_inference(settings) == 0
    suite = json.loads((tmp_path / "inference_tiny_64x96_cpu.json").read_text(encoding="utf-8"))
    published, ours = suite["variants"]
    assert ours["difference"] < 1e-4 and 0 < ours["operations"] < published["operations"]
    assert suite["facts"]["threads"] == 1
    page = (tmp_path / "inference_tiny_64x96_cpu.md").read_text(encoding="utf-8")
    assert "| ours-exact |" in page and "threads: 1" in page


def rows_of(text: str) -> dict[str, list[float]]:
    """Figures of the tables' variants."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.search(r"\| *[\d.]+", line)]
    return {name: [float(figure) for figure in figures if figure != "–"] for name, *figures in rows}


def test_the_metric_is_measured(capsys):
    data_speed.measure_data(data_speed.DataSettings(what="metric", size=(64, 96), repeats=1))
    text = capsys.readouterr().out
    assert text.count("prediction torch.") == 3 and all(figures[0] > 0 for figures in rows_of(text).values())


def test_the_audit_is_measured(capsys):
    data_speed.measure_data(data_speed.DataSettings(what="audit", images=1, repeats=1, sets=(600, 400)))
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert rows.keys() == {"comparison", "hashing png", "decoding png", "hashing jpg", "decoding jpg"}
    assert rows["hashing png"][0] > 0 and text.count("audit of 600 x 400: ") == 2


@pytest.mark.slow
def test_the_loader_is_measured(tmp_path, capsys):
    data_speed.measure_data(
        data_speed.DataSettings(what="loader", images=8, samples=40, memory=32, workers=1, repeats=1, out=tmp_path)
    )
    suite = json.loads((tmp_path / "loader.json").read_text(encoding="utf-8"))
    assert all(variant["seconds"] > 0 for variant in suite["variants"]) and suite["variants"][-1]["memory"] > 0


def test_the_page_shows_the_results(tmp_path, capsys):
    results = [
        Result("published-order", 4.0, [4.0], 1000, 10, 5.0, 0.5),
        Result("ours-exact", 2.0, [2.0], 500, 8, 5.0, 0.8, 2e-6),
        Result("ours-int8", error="Traceback\nValueError: no"),
    ]
    folder, page = tmp_path / "results", tmp_path / "speed.md"
    write_results(Settings(device="cpu", out=folder), "inference_x", "Inference", results, ["published-order"])
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    write, check = (TableSettings(check=check, results=folder, page=page) for check in (False, True))
    assert write_tables(check) == 1 and "old" in page.read_text(encoding="utf-8")
    assert write_tables(write) == 0 and write_tables(check) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| ours-exact | 2 | 2.00 | 80% | 0.50 | 2.0e-06 |" in text and "| ours-int8 | failed" in text
    (folder / "mode_changes.md").write_text("# What changes\n\n| a |\n", encoding="utf-8")
    assert write_tables(write) == 0 and "\nWhat changes\n\n| a |\n" in page.read_text(encoding="utf-8")
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError):
        write_tables(write)


def test_docs_show_the_committed_results():
    assert list(RESULTS.glob("inference_*.json"))
    assert write_tables(TableSettings(check=True)) == 0
