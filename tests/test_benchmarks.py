"""The speed suites: they measure what they say, and the published order of work gives the model's numbers."""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import inference_speed
import pytest
import speed_table
import torch
from benchmark_contenders import build_failing, build_linear
from conftest import micro_model
from measure import (
    Contender,
    Result,
    Settings,
    count_operations,
    exit_status,
    measure,
    results_table,
    speed_ratio,
    write_results,
)
from published_order import PARTS, PUBLISHED_SECONDS, PublishedOrder, time_parts
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(repeats=2, device="cpu", threads=1, pause=0, product_size=64)


# ---- the published order of work


@pytest.mark.parametrize("size", [(32, 32), (50, 70), (24, 40)])
def test_the_published_order_gives_the_scores_of_the_model(model, size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    for parameter in model.parameters():  # the zeros of a new model would hide what is left out
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    order = PublishedOrder(model)
    with torch.no_grad():
        scores = order.scores(images)
    expected = model.segment(images)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    assert torch.equal(order(images), expected.argmax(1))


def test_the_published_order_does_its_work_in_every_window(monkeypatch):
    model = micro_model()
    calls = []
    encode = model.model.text_queries.encode
    monkeypatch.setattr(model.model.text_queries, "encode", lambda: calls.append("text") or encode())
    monkeypatch.setattr(
        PublishedOrder, "predict", lambda *args, was=PublishedOrder.predict: calls.append("predict") or was(*args)
    )
    PublishedOrder(model)(torch.randn(1, 3, 32, 52))
    assert calls.count("text") == 2 and calls.count("predict") == 2 * (1 + 2)


def test_the_parts_of_the_published_order_sum_up_to_all_of_it(images):
    parts = time_parts(PublishedOrder(micro_model()), images)
    assert parts.keys() == {*PARTS, "rest"} == PUBLISHED_SECONDS.keys()
    assert all(value > 0 for value in parts.values())


# ---- the harness


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """Two layers, one of which holds 200 MB, and two contenders that fail."""
    contenders = [
        Contender("light", partial(build_linear, 0.0, 0)),
        Contender("heavy", partial(build_linear, 0.25, 200)),
        Contender("wrong", partial(build_failing, 2)),
        Contender("gone", partial(build_failing, -1)),
    ]
    return {result.name: result for result in measure(contenders, SETTINGS, compare_with="light")}


def test_memory_is_what_a_contender_holds(results):
    if results["light"].memory is None:
        pytest.skip("this system has no /proc")
    assert 190e6 < results["heavy"].memory - results["light"].memory < 215e6


def test_operations_medians_and_utilisation(results):
    light = results["light"]
    assert len(light.rounds) == 2 and light.seconds == sum(light.rounds) / 2 and len(light.warm_up_seconds) == 1
    assert light.operations == 2 * 8 * 32 * 32 and light.dtype == "float32"
    assert light.utilisation == pytest.approx(light.operations / light.seconds / light.rate)


def test_numbers_are_compared_on_the_same_weights_and_input(results):
    assert results["light"].difference is None and results["light"].span is not None
    assert results["heavy"].difference == pytest.approx(0.25, abs=1e-6)


def test_a_failure_is_reported_and_the_others_go_on(results):
    assert "ValueError: call 2 is wrong" in results["wrong"].error and results["wrong"].seconds is None
    assert "exit code 3" in results["gone"].error
    assert results["light"].error is None and results["heavy"].error is None
    assert exit_status(list(results.values())) == 1 and exit_status([results["light"]]) == 0
    table = results_table(list(results.values()), ["light", "absent"])
    assert "| wrong | failed: ValueError: call 2 is wrong |" in table and "| light | " in table


def test_ratios_are_of_the_same_round():
    slow, fast = Result("slow", 3.0, [2.0, 3.0, 8.0]), Result("fast", 1.0, [1.0, 1.0, 2.0])
    assert speed_ratio(fast, slow) == (3.0, 2.0, 4.0) and speed_ratio(slow, Result("failed", error="x")) is None


def test_attention_is_counted():
    q = torch.randn(1, 2, 64, 16)
    wanted = 2 * (2 * 2 * 64 * 64 * 16)  # two products, two heads
    with torch.inference_mode():
        assert count_operations(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == wanted


# ---- the suites


def test_the_inference_suite_runs_from_end_to_end(tmp_path, capsys):
    argv = "--preset tiny --size 64x96 --contenders published-order ours-exact --repeats 1 --device cpu --threads 1"
    assert inference_speed.main([*argv.split(), "--out", str(tmp_path)]) == 0
    suite = json.loads((tmp_path / "inference_tiny_64x96_cpu.json").read_text(encoding="utf-8"))
    published, ours = suite["contenders"]
    assert ours["difference"] < 1e-4 and 0 < ours["operations"] < published["operations"]
    assert suite["facts"]["threads"] == 1 and suite["facts"]["published_order_parts"].keys() == PUBLISHED_SECONDS.keys()
    page = (tmp_path / "inference_tiny_64x96_cpu.md").read_text(encoding="utf-8")
    assert "| ours-exact |" in page and "| pixel decoder |" in page and "not include grid_sample" in page


def test_an_unknown_contender_is_an_error():
    with pytest.raises(SystemExit, match="no contender ours-magic at this size; there are published-order, ours-plain"):
        inference_speed.main(["--preset", "tiny", "--size", "64x96", "--contenders", "ours-magic"])


def test_the_table_in_the_readme_is_the_results(tmp_path, capsys):
    contenders = [
        Result("published-order", 4.0, [4.0], 1000, 10, 5.0, 0.5),
        Result("ours-exact", 2.0, [2.0], 500, 8, 5.0, 0.8, 2e-6),
        Result("ours-int8", error="Traceback\nValueError: no"),
    ]
    facts = {
        "device": "cpu",
        "processor": "x",
        "threads": 2,
        "cores": 2,
        "torch": "2",
        "transformers": "5",
        "order": "in turns",
    }
    facts |= {
        "date": "2030-01-01",
        "repeats": 1,
        "warm_ups": 1,
        "command": "python x",
        "tf32": "none",
        "environment": {"PAGES": "1"},
        "not_counted": "nothing",
    }
    write_results(tmp_path / "results", "inference_x", "Inference", contenders, ["published-order"], facts)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{speed_table.BEGIN}\nold\n{speed_table.END}\n\nafter\n", encoding="utf-8")
    options = ["--results", str(tmp_path / "results"), "--readme", str(readme)]
    assert speed_table.main(["--check", *options]) == 1 and "old" in readme.read_text(encoding="utf-8")
    assert speed_table.main(options) == 0 and speed_table.main(["--check", *options]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| ours-exact | 2 | 2.00 | 0.50 | 80% | 2e-06 |" in text and "| ours-int8 | failed |" in text
    (tmp_path / "results" / "mode_changes.md").write_text("# What changes\n\n| a |\n", encoding="utf-8")
    assert speed_table.main(options) == 0 and "\nWhat changes\n\n| a |\n" in readme.read_text(encoding="utf-8")
    readme.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="add the lines"):
        speed_table.main(options)


def test_the_readme_shows_the_committed_results():
    assert list(speed_table.RESULTS.glob("inference_*.json"))
    assert speed_table.main(["--check"]) == 0
