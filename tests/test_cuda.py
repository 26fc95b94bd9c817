"""What only a GPU can show: that graphs can be recorded, that nothing waits, that memory does not grow.

python -m pytest -m cuda tests/test_cuda.py
"""

import csv
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import MODELS, random_set
from test_device import KINDS
from torch.testing import assert_close

import common

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # PyTorch's, about TF32 and operators that are not deterministic
]
TWO_RULES = ["dcgan", "wgan"]  # Adam and RMSProp; what the run part does is the same in every file
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """Two runs differ by little, and what a run switches on is switched off afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_stream(torch.cuda.default_stream())


@pytest.fixture
def replays(monkeypatch):
    """A list that grows by one with each replay of a graph."""
    replay, seen = torch.cuda.CUDAGraph.replay, []

    def counted(graph):
        seen.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return seen


@pytest.fixture
def parts(configure):
    """parts(model, shape, *flags) → config, what build() returns; all on the GPU, the rate falls."""

    def parts(model, shape, *flags):
        config = configure(model, shape, "--decay-start", "2", "--decay-end", "7", *flags)
        config.device = "cuda"
        torch.manual_seed(config.seed)
        sets = [tuple(part.cuda() for part in random_set(100, shape, config.classes)) for _ in range(2)]
        return config, model.build(config, *sets)

    return parts


@pytest.fixture
def run(parts, tmp_path):
    """run(model, out, shape, *flags, capture, steps=8, saved=None) → its last checkpoint and its numbers."""

    def run(model, out, shape, *flags, capture, steps=8, saved=None):
        config, built = parts(
            model, shape, "--steps", steps, "--log-every", "1", "--sample-every", "3", *flags
        )
        config.out = str(tmp_path / out)
        model.train(config, *built, saved, capture)
        with open(tmp_path / out / "metrics.csv") as file:
            numbers = [[float(value) for value in row] for row in list(csv.reader(file))[1:]]
        path = tmp_path / out / "checkpoint.pt"
        return torch.load(path, map_location="cpu", weights_only=True), torch.tensor(numbers)

    return run


def assert_same(one, other):
    assert_close(one[0]["networks"], other[0]["networks"], **CLOSE)
    assert_close(one[0]["rng"], other[0]["rng"], rtol=0, atol=0)
    assert_close(one[1], other[1], rtol=1e-2, atol=1e-3)


# The graph


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_captured_steps_are_eager_steps(model, kind, run, replays):
    eager = run(model, "eager", *KINDS[kind], capture=False)
    assert not replays
    captured = run(model, "captured", *KINDS[kind], capture=True)
    assert len(replays) == 5
    assert_same(captured, eager)


@pytest.mark.parametrize("first", [2, 3, 5])
@pytest.mark.parametrize("model", TWO_RULES, indirect=True)
def test_a_captured_run_that_was_resumed_is_the_whole_one(model, first, run):
    whole = run(model, "whole", [2], capture=True)
    saved, _ = run(model, "parts", [2], capture=True, steps=first)
    assert_same(run(model, "parts", [2], capture=True, saved=saved), whole)


@pytest.mark.parametrize("model", ["wgan", "gm_wae"], indirect=True)
def test_pictures_change_nothing(model, run):
    with_pictures = run(model, "with", [1, 16, 16], "--sample-every", "1", capture=True)
    without = run(model, "without", [1, 16, 16], "--sample-every", "1000", capture=True)
    assert_same(with_pictures, without)


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_memory_does_not_grow(model, parts):
    """Neither by eager iterations, once the optimisers have their state, nor by replays."""
    _, (*_, iteration, _) = parts(model, [1, 16, 16])
    eager, replayed = [], []
    for _ in range(20):
        iteration()
        eager.append(torch.cuda.memory_allocated())
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream())
    for _ in range(3):
        iteration()
    replay = model.recorded(iteration)
    for _ in range(20):
        for _ in range(100):
            replay()
        replayed.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    torch.cuda.synchronize()
    assert len(set(eager[10:])) == 1
    assert len(set(replayed)) == 1


# The loop


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_between_its_logs_the_loop_never_waits_for_the_gpu(model, parts):
    config, (nets, optimizers, iteration, pictures) = parts(model, [1, 16, 16], "--steps", "20")
    steps = []

    def step():
        steps.append(None)
        if len(steps) == 5:
            torch.cuda.set_sync_debug_mode("error")
        if len(steps) == 15:
            torch.cuda.set_sync_debug_mode("default")
        return iteration()

    try:
        model.train(config, nets, optimizers, step, pictures, None, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 20


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_a_run_may_move_from_the_gpu_to_the_cpu_and_back(model, replays, tmp_path):
    flags = ["--dataset", "ring", "--z-dim", "5", "--width", "4", "--batch-size", "8"]
    out = str(tmp_path / "run")
    model.main([*flags, "--device", "cuda", "--steps", "6", "--out", out])
    assert len(replays) == 3
    model.main(["--resume", out, "--device", "cpu", "--steps", "8"])
    assert len(replays) == 3
    model.main(["--resume", out, "--device", "cuda", "--steps", "13"])
    assert len(replays) == 5
    saved = torch.load(Path(out, "checkpoint.pt"), map_location="cpu", weights_only=True)
    assert saved["step"] == 13
    assert all(value.isfinite().all() for net in saved["networks"].values() for value in net.values())


def test_a_full_memory_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags = ["--dataset", "ring", "--batch-size", "20000000000", "--steps", "1"]
        import_module("wgan").main([*flags, "--device", "cuda", "--out", str(tmp_path / "run")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wgan.py: ")]
    assert stopped.value.code == 2
    assert len(lines) == 1 and "memory" in lines[0] and "--batch-size" in lines[0]


# Data that stay on the host


def test_batches_from_the_host_are_those_of_the_host():
    x = torch.randint(256, (1000, 1, 8, 8), dtype=torch.uint8)
    torch.manual_seed(0)
    batches = [common.sample_batch(x, 64, "cuda") for _ in range(50)]
    torch.manual_seed(0)
    for batch in batches:
        assert batch.is_cuda
        assert_close(batch.cpu(), common.sample_batch(x, 64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", TWO_RULES, indirect=True)
def test_a_run_with_its_data_on_the_host(model, replays, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    flags = ["--dataset", "ring", "--z-dim", "5", "--width", "4", "--batch-size", "8", "--device", "cuda"]

    def networks(out):
        path = tmp_path / out / "checkpoint.pt"
        return torch.load(path, map_location="cpu", weights_only=True)["networks"]

    model.main([*flags, "--steps", "8", "--out", str(tmp_path / "whole")])
    assert "stay on the host" in capsys.readouterr().err
    model.main([*flags, "--steps", "5", "--out", str(tmp_path / "parts")])
    model.main(["--resume", str(tmp_path / "parts"), "--device", "cuda", "--steps", "8"])
    assert not replays  # each step copies its batch, so none is recorded
    assert_close(networks("parts"), networks("whole"), **CLOSE)
