"""tools.bench: what it compares is the same mathematics, and its clocks and tables say what was measured."""

import argparse
import json
from importlib import import_module

import pytest
import torch
from torch.testing import assert_close

from common import as_float
from tools import bench
from tools.runs import model_names

CASES = [(name, shape) for name in model_names() for shape in ([3, 8, 8], [2])]


@pytest.fixture
def double():
    """Everything in float64, where Adam's ε is above the rounding of a gradient that should be 0."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name, shape", CASES, ids=str)
def test_the_baseline_computes_the_same(name, shape, double, configure, monkeypatch):
    """From one seed and the same batches it ends with the same weights: only its ways are others."""
    model, nets = import_module(name), []
    x = torch.randn(180, 2) if len(shape) == 1 else torch.randint(256, (180, *shape), dtype=torch.uint8)
    batches = list(as_float(x).double().split(6))
    config = configure(model, shape, *["--pretrain-steps", "0"] * (name == "gm_wae"))
    handed = bench.handed

    def watched(*args):
        hands = handed(*args)
        nets.append(hands[1])
        return hands

    monkeypatch.setattr(bench, "DataLoader", lambda *_, **__: batches)
    monkeypatch.setattr(bench, "handed", watched)
    step = bench.baseline(model, config, x, x)
    losses = [step() for _ in range(3)]
    ours = iter(batches)
    monkeypatch.setattr(model, "sample_batch", lambda *_: next(ours))
    iteration = watched(model, config, x, x)[3]
    assert_close(losses, [[v.item() for v in iteration().values()] for _ in range(3)], rtol=1e-6, atol=1e-9)
    assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=1e-6, atol=1e-9)
    for net, last in zip(nets, (False, True), strict=True):
        weights = [weight for weight in net.parameters() if weight.dim() == 4]
        formats = [weight.is_contiguous(memory_format=torch.channels_last) for weight in weights]
        assert not weights or all(formats) == last


def test_pictures_of_the_baseline_are_those_of_sample_batch():
    x = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    pictures = bench.Pictures(x)
    assert_close(torch.stack([pictures[i] for i in range(len(pictures))]), as_float(x))
    points = torch.randn(5, 2)
    assert torch.equal(torch.stack([bench.Pictures(points)[i] for i in range(5)]), points)


def test_the_clock_and_the_race(monkeypatch):
    """Seconds per call, in turns; a second costs what the fake clock says."""
    now, calls = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def taking(name, seconds):
        def step():
            calls.append(name)
            now[0] += seconds

        return step

    cpu = torch.device("cpu")
    assert bench.clock(taking("a", 0.5), 6, cpu) == 3
    calls.clear()
    found = bench.race({"a": taking("a", 0.125), "b": taking("b", 0.5)}, 3.5, cpu)
    assert found == {"a": 0.125, "b": 0.5}
    assert calls == 4 * ["a"] + 4 * ["b"] + bench.ROUNDS * (4 * ["a"] + ["b"])


@pytest.mark.parametrize(
    "spans, share",
    [([(0, 4)], 1), ([(2, 4), (0, 1)], 0.75), ([(0, 3), (1, 2), (2, 4), (9, 10)], 0.5)],
)
def test_the_share_of_time_that_is_covered(spans, share):
    assert bench.covered(spans) == share


def test_a_sweep_names_the_power_by_which_cost_grows():
    base = {"model": "wgan", "batch_size": 64, "width": 16, "image_size": 32, "iteration_s": 0.01}
    results = [
        base,
        base | {"batch_size": 128, "iteration_s": 0.02},
        base | {"width": 32, "iteration_s": 0.04},
    ]
    assert bench.sweep_table(results)[1:] == [
        ["wgan", "as given", "10.00", "1.00", "–"],
        ["wgan", "batch size 128", "20.00", "2.00", "1.00"],
        ["wgan", "width 32", "40.00", "4.00", "2.00"],
    ]


def test_a_figure_that_is_missing_is_a_dash():
    rows = bench.table(
        [{"model": "a", "steps_per_s": 5}, {"model": "b", "steps_per_s": 0.5, "gpu_busy": 0.25}]
    )
    assert rows == [["model", "steps/s", "GPU busy [%]"], ["a", "5", "–"], ["b", "0.5", "25"]]


def test_the_settings_of_a_sweep():
    """Those of `SWEEP`, but none twice, none too small for batch norm, and no image size of points."""

    def settings(*flags):
        options = argparse.Namespace(**dict.fromkeys(("data_dir", *bench.SETTINGS)), seconds=1, seed=0)
        options.device, options.sweep = torch.device("cpu"), True
        vars(options).update(zip(flags[::2], flags[1::2], strict=True))
        tasks = [flags[-2:] for _, flags, *_ in bench.tasks("wgan", options)][1:]
        return [f"{name[2:]} {value}" for name, value in tasks]

    whole = ["batch-size 32", "batch-size 128", "batch-size 256", "width 32", "width 128", "image-size 64"]
    assert settings() == whole
    assert settings("width", 1, "batch_size", 2, "dataset", "ring") == [
        "batch-size 4",
        "batch-size 8",
        "width 2",
    ]


MISTAKES = (
    ["nothing"],
    ["--width", "0"],
    ["--seconds", "x"],
    ["--sweep", "--baseline"],
    ["--json", "no/x.json"],
)


@pytest.mark.parametrize("flags", MISTAKES, ids=str)
def test_a_mistake_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(flags)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def failing(error):
    """A stand-in for a measurement, which for wgan_gp raises the error."""

    def measured(task):
        if task[0] == "wgan_gp":
            raise error
        settings = {"device": "cpu", "dataset": "ring", "image_size": 32}
        return {"model": task[0], "iteration_s": 1.0, "steps_per_s": 1.0} | settings

    return measured


@pytest.mark.parametrize(
    "error, rows",
    [(torch.OutOfMemoryError("full"), ["wgan", "wbli"]), (ValueError("no data"), ["wgan"])],
    ids=str,
)
def test_what_was_measured_before_a_failure_is_printed(error, rows, monkeypatch, capsys):
    """A full memory is one model's; a mistake is all models', and said once."""
    monkeypatch.setattr(bench, "in_a_process", failing(error))
    with pytest.raises(SystemExit) as stopped:
        bench.main(["wgan", "wgan_gp", "wbli"])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.err.count("error:") == 1
    assert [line.split()[0] for line in printed.out.splitlines()[1:-1]] == rows


def test_a_whole_measurement(tmp_path, capsys):
    flags = ["--dataset", "ring", "--width", "2", "--batch-size", "8", "--device", "cpu", "--seconds", "1"]
    bench.main(["wgan", *flags, "--json", str(tmp_path / "bench.json")])
    (result,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert (result["model"], result["dataset"], result["batch_size"], result["width"]) == (
        "wgan",
        "ring",
        8,
        2,
    )
    for key in ("iteration_s", "start_s", "peak_bytes", "steps_per_s"):
        assert result[key] > 0
    assert_close(result["images_per_s"], 8 * result["steps_per_s"])
    printed = capsys.readouterr().out
    assert "steps/s" in printed and "ring" in printed and torch.__version__ in printed


def test_the_loops_seconds_are_those_of_its_steps(configure, monkeypatch):
    """A long run less a short one: what both take once does not count."""
    model = import_module("wgan")
    x = torch.randn(50, 2)
    hands = bench.handed(model, configure(model, [2]), x, x)
    now, ran = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def run(config, *_):
        ran.append(config.steps)
        now[0] += 100 + 0.25 * config.steps

    monkeypatch.setattr(model, "run", run)
    assert bench.loop_seconds(model, hands, 40) == 0.25
    assert sorted(ran) == [5, 5, 45] and ran[0] == 5  # the first, which chooses kernels, does not count
