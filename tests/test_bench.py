"""tools.bench: it compares the same mathematics; clocks, counts and tables say what was measured."""

import argparse
import json
from importlib import import_module
from itertools import cycle

import pytest
import torch
from conftest import MODELS, random_set
from torch import nn
from torch.testing import assert_close

from common import as_float, sample_batch
from tools import bench, floor, timing

CASES = [(name, shape) for name in MODELS for shape in ([3, 8, 8], [2])]


@pytest.fixture
def double():
    """Everything in float64, where Adam's ε is above the rounding of a gradient that should be 0."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name, shape", CASES, ids=str)
def test_the_baseline_computes_the_same(name, shape, double, configure, monkeypatch):
    """From one seed and the same batches it ends with the same weights: only its ways are others."""
    model, built = import_module(name), []
    config = configure(model, shape, *["--pretrain-steps", "0"] * (name == "gm_wae"))
    x, y = random_set(180, shape, config.classes)
    x = as_float(x).double()
    batches = list(zip(x.split(6), y.split(6), strict=True))
    build, ours = model.build, cycle(batches)

    def watched(*args):
        torch.manual_seed(3)
        built.append(build(*args))
        return built[-1]

    def same_batch(x, n, device=None, y=None):
        if len(x) < 180:  # the labelled items
            return sample_batch(x, n, device, y)
        torch.randint(len(x), (n,))  # as the true one does
        batch = next(ours)
        return batch if y is not None else batch[0]

    monkeypatch.setattr(timing, "DataLoader", lambda *_, **__: batches)
    monkeypatch.setattr(model, "build", watched)
    step = timing.baseline(model, config, (x, y), (x, y))
    losses = [step() for _ in range(3)]
    monkeypatch.setattr(model, "sample_batch", same_batch)
    _, _, iteration, _ = watched(config, (x, y), (x, y))
    assert_close(losses, [[v.item() for v in iteration().values()] for _ in range(3)], rtol=1e-6, atol=1e-9)
    (plain, optimizers, *_), (nets, *_) = built
    assert_close(plain.state_dict(), nets.state_dict(), rtol=1e-6, atol=1e-9)
    assert all(len(optimizer.state) for optimizer in optimizers.values())  # these ones made the steps
    assert not any(
        group["fused"] for o in optimizers.values() for group in o.param_groups if "fused" in group
    )
    for net, last in ((plain, False), (nets, True)):
        weights = [weight for weight in net.parameters() if weight.dim() == 4]
        formats = [weight.is_contiguous(memory_format=torch.channels_last) for weight in weights]
        assert not weights or all(formats) == last


def test_a_batch_larger_than_the_data_set(configure):
    """The DataLoader, which leaves out what is no whole batch, would be empty for ever."""
    model, few = import_module("dcgan"), random_set(5, [1, 8, 8], 5)
    with pytest.raises(ValueError, match="5 training items, too few"):
        timing.baseline(model, configure(model, [1, 8, 8]), few, few)


def test_pictures_of_the_baseline_are_those_of_sample_batch():
    x, y = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8), torch.arange(5)
    pictures = timing.Pictures(x, y)
    assert_close(torch.stack([pictures[i][0] for i in range(len(pictures))]), as_float(x))
    assert [pictures[i][1].item() for i in range(5)] == [0, 1, 2, 3, 4]
    points = torch.randn(5, 2)
    assert torch.equal(torch.stack([timing.Pictures(points, None)[i][0] for i in range(5)]), points)


# The floor


def test_what_is_counted():
    """A product 2·n·m·k; a convolution; what reads, writes, only looks, only allocates, or gathers."""
    a, b, data = torch.rand(4, 5), torch.rand(5, 6), torch.rand(1000, 7)
    rows = torch.arange(3)
    assert floor.counted(lambda: a @ b) == [(2 * 4 * 5 * 6, 4 * (20 + 30 + 24))]
    assert floor.counted(lambda: a + 1) == [(0, 4 * (20 + 20))]
    assert floor.counted(lambda: a.add_(1)) == [(0, 4 * (20 + 20))]
    assert floor.counted(lambda: a.t()[1:].expand(3, 4, 4).detach()) == []
    assert floor.counted(lambda: torch.empty(9)) == []
    assert floor.counted(lambda: data[rows]) == [(0, 2 * 4 * 21)]
    assert floor.counted(lambda: torch.ones(()).expand(50).sum())[-1] == (0, 4 + 4)
    assert floor.counted(lambda: torch._foreach_add_([a, b], 1.0)) == [(0, 2 * 4 * (20 + 30))]
    x, conv = torch.rand(2, 3, 8, 8), nn.Conv2d(3, 4, 3, bias=False)
    ((flops, _),) = floor.counted(lambda: conv(x))
    assert flops == 2 * 2 * 4 * 3 * 3 * 3 * 6 * 6
    loss = conv(x).sum()
    backward = [flops for flops, _ in floor.counted(loss.backward) if flops]
    assert backward == [flops]  # for the weights; x needs no gradient


def test_the_floor_of_a_kernel_is_its_slowest_part():
    kernels = [(0, 10), (2000, 10), (2000, 90_000)]
    assert floor.seconds(kernels, 1e7, 1e9) == pytest.approx(2.5e-6 + 2e-4 + 2e-4)
    assert floor.seconds(kernels[2:], 1e12, 1e9) == pytest.approx(9e-5)


def test_counting_is_a_step(start):
    """It changes the weights as a step does, and five critic updates cost more than one."""
    counts = []
    for critic_steps in (1, 5):
        started = start(import_module("wgan"), [1, 8, 8], "--critic-steps", critic_steps)
        kernels = floor.counted(started.iteration)
        counts.append([len(kernels), *map(sum, zip(*kernels, strict=True))])
        assert len(started.updates) == critic_steps + 1
    assert all(2 < five / one < 5 for one, five in zip(*counts, strict=True))


# Clocks


def test_the_clock_and_the_race(monkeypatch):
    """Seconds per call, in turns; a second costs what the fake clock says."""
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def taking(name, seconds):
        def step():
            calls.append(name)
            now[0] += seconds

        return step

    cpu = torch.device("cpu")
    assert timing.clock(taking("a", 0.5), 6, cpu) == 3
    calls.clear()
    found = timing.race({"a": taking("a", 0.125), "b": taking("b", 0.5)}, 3.5, cpu)
    assert found == {"a": 0.125, "b": 0.5}
    assert calls == 4 * ["a"] + 4 * ["b"] + timing.ROUNDS * (4 * ["a"] + ["b"])


@pytest.mark.parametrize(
    "spans, share",
    [([(0, 4)], 1), ([(2, 4), (0, 1)], 0.75), ([(0, 3), (1, 2), (2, 4), (9, 10)], 0.5)],
)
def test_the_share_of_time_that_is_covered(spans, share):
    assert timing.covered(spans) == share


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
        options = argparse.Namespace(**dict.fromkeys(bench.SETTINGS), data_dir="data", seconds=1, seed=0)
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
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ["wgan", "wbli"]),
        (ValueError("no labels"), ["wgan", "wbli"]),
    ],
    ids=str,
)
def test_what_was_measured_before_a_failure_is_printed(error, rows, monkeypatch, capsys):
    """A full memory, or labels that a data set lacks, are one model's; the others are measured."""
    monkeypatch.setattr(bench, "in_a_process", failing(error))
    with pytest.raises(SystemExit) as stopped:
        bench.main(["wgan", "wgan_gp", "wbli"])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.err.count("error:") == 1
    assert [line.split()[0] for line in printed.out.splitlines()[1:-1]] == rows


def test_a_file_that_cannot_be_written_is_found_first(tmp_path, monkeypatch, capsys):
    """And one that can keeps its contents until there are others."""
    monkeypatch.setattr(bench, "in_a_process", lambda task: pytest.fail("it was measured"))
    with pytest.raises(SystemExit):
        bench.main(["wgan", "--json", str(tmp_path)])
    assert str(tmp_path) in capsys.readouterr().err
    (tmp_path / "kept.json").write_text("kept")
    monkeypatch.setattr(bench, "in_a_process", failing(ValueError("no data")))
    with pytest.raises(SystemExit):
        bench.main(["wgan_gp", "--json", str(tmp_path / "kept.json")])
    assert (tmp_path / "kept.json").read_text() == "kept"


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
    for key in ("iteration_s", "start_s", "peak_bytes", "steps_per_s", "kernels", "flops", "bytes"):
        assert result[key] > 0
    assert_close(result["images_per_s"], 8 * result["steps_per_s"])
    printed = capsys.readouterr().out
    assert "steps/s" in printed and "ring" in printed and torch.__version__ in printed


def test_the_loops_seconds_are_those_of_its_steps(configure, monkeypatch):
    """A long run less a short one: what both take once does not count."""
    model = import_module("wgan")
    now, ran = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def train(config, *_, capture):
        assert capture
        ran.append(config.steps)
        now[0] += 100 + 0.25 * config.steps

    monkeypatch.setattr(model, "train", train)
    assert timing.loop_seconds(model, configure(model, [2]), (None,) * 4, 40) == 0.25
    assert sorted(ran) == [5, 5, 45] and ran[0] == 5  # the first, which chooses kernels, does not count
