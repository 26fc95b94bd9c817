"""The iteration as a CUDA graph: how the loop records and replays it, and, on a GPU, that nothing changes."""

import contextlib
import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import common
from tools.bench import recorded

ROOT = Path(__file__).parents[1]
ALL = ("dcgan", "wgan", "wgan_gp", "bigan", "wbli", "gm_wae", "alpha_gan")
MODELS = [name for name in ALL if (ROOT / f"{name}.py").exists()]
TINY = ["--width", "4", "--z-dim", "8", "--batch-size", "8"]

each = pytest.mark.parametrize("model", MODELS, indirect=True)
without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(test):
    return pytest.mark.cuda(without_gpu(test))


# The loop, with stand-ins for the graph


@pytest.fixture
def recorder(monkeypatch):
    """Stands in for CUDA: what is called under `torch.cuda.graph` is recorded, and replay() runs it again."""
    seen = SimpleNamespace(streams=[], events=[], now=None)

    class Graph:
        def replay(self):
            seen.events.append("replay")
            for name, value in seen.step().items():
                seen.metrics[name].copy_(value)

    @contextlib.contextmanager
    def graph(made, stream):
        assert stream is seen.streams[-1]  # not the default one
        seen.events.append("capture")
        seen.now = made
        yield
        seen.now = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "set_stream", seen.streams.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: seen.streams[-1])
    return seen


def under_capture(model, seen, monkeypatch):
    """Makes this model's next run a captured one, as far as the loop can tell."""
    run = model.run

    with open("plain/metrics.csv") as file:
        names = next(csv.reader(file))[1:]

    def captured(config, nets, optimizers, iteration, pictures, saved, device, capture):
        def step():
            if seen.now is None:
                seen.events.append("eager")
                return iteration()
            seen.step, seen.metrics = iteration, {name: torch.full((), torch.nan) for name in names}
            return seen.metrics  # nothing is executed

        run(config, nets, optimizers, step, pictures, saved, device, True)

    monkeypatch.setattr(model, "run", captured)


@each
@pytest.mark.parametrize("first, then", [(9, 0), (4, 5), (3, 6), (5, 4)])
def test_three_steps_are_real_one_is_recorded_and_all_others_replayed(
    model, first, then, recorder, tmp_path, monkeypatch
):
    """No step is lost or done twice, neither at the capture nor at a resume: the run is the eager one's."""
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "ring", *TINY, "--device", "cpu", "--log-every", "1", "--sample-every", "2"]
    model.main([*flags, "--steps", "9", "--out", "plain"])
    under_capture(model, recorder, monkeypatch)
    model.main([*flags, "--steps", str(first), "--out", "captured"])
    if then:
        model.main(["--resume", "captured", "--steps", "9", "--device", "cpu"])
    expected = []
    for steps in (first, then):
        expected += ["eager"] * min(steps, 3) + ["capture"] * (steps > 3) + ["replay"] * max(0, steps - 3)
    assert recorder.events == expected
    plain, captured = (torch.load(f"{run}/checkpoint.pt", weights_only=True) for run in ("plain", "captured"))
    assert_close(captured["networks"], plain["networks"], rtol=0, atol=0)
    assert Path("captured/metrics.csv").read_text() == Path("plain/metrics.csv").read_text()


@each
def test_without_a_gpu_nothing_is_captured(model, start, monkeypatch):
    found, seen = start(model, [2]), []
    monkeypatch.setattr(model, "run", lambda *args: seen.append(args))
    model.train(found.config, found.x_train, found.x_test)
    (args,) = seen
    assert len(args) == 8 and args[-1] is False


@each
def test_a_full_memory_is_one_sentence(model, tmp_path, monkeypatch, capsys):
    def train(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(model, "train", train)
    with pytest.raises(SystemExit) as stopped:
        model.main(["--dataset", "ring", "--device", "cpu", "--out", str(tmp_path / "run")])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1
    assert "memory" in line and "--batch-size" in line and "--width" in line


# On a GPU


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


def train(model, out, *flags, eager=False):
    """The networks of a short run on the GPU."""
    if flags[0] != "--resume":
        flags = (*flags, *TINY, "--log-every", "1", "--sample-every", "2", "--out", str(out))
    with pytest.MonkeyPatch.context() as patch:
        run = model.run
        if eager:
            patch.setattr(model, "run", lambda *args: run(*args[:-1], False))
        model.main([*flags, "--device", "cuda"])
    saved = torch.load(Path(out) / "checkpoint.pt", map_location="cpu", weights_only=True)
    return saved["networks"]


@on_gpu
@each
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flags", [["--network", "conv"], ["--network", "mlp"], ["--dataset", "ring"]])
def test_captured_steps_are_eager_steps(model, flags, deterministic, tmp_path):
    eager = train(model, tmp_path / "eager", *flags, "--steps", "8", eager=True)
    captured = train(model, tmp_path / "captured", *flags, "--steps", "8")
    assert_close(captured, eager, rtol=1e-3, atol=1e-4)
    shorter = train(model, tmp_path / "shorter", *flags, "--steps", "7")
    assert any(not torch.equal(shorter[net][key], captured[net][key]) for net in eager for key in eager[net])


@on_gpu
@each
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [2, 5])
def test_resuming_a_captured_run(model, first, deterministic, tmp_path):
    whole = train(model, tmp_path / "whole", "--dataset", "ring", "--steps", "10")
    train(model, tmp_path / "parts", "--dataset", "ring", "--steps", str(first))
    parts = train(model, tmp_path / "parts", "--resume", str(tmp_path / "parts"), "--steps", "10")
    assert_close(parts, whole, rtol=1e-3, atol=1e-4)


@on_gpu
@each
@pytest.mark.filterwarnings("ignore")
def test_no_synchronisation_and_no_growing_memory(model, tmp_path, monkeypatch):
    """Once the optimisers have their state an iteration never waits for the GPU and leaves nothing there.

    Nor do 10 000 replays.
    """
    used, replayed = [], []

    def run(config, nets, optimizers, iteration, pictures, saved, device, capture):
        assert capture
        for _ in range(3):
            iteration()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                iteration()
                used.append(torch.cuda.memory_allocated())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())
        replay = recorded(iteration)
        for _ in range(100):
            for _ in range(100):
                replay()
            replayed.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    monkeypatch.setattr(model, "run", run)
    model.main([*TINY, "--device", "cuda", "--out", str(tmp_path / "run")])
    assert len(set(used[5:])) == len(set(replayed)) == 1


@on_gpu
def test_batches_from_the_host_are_those_of_the_host(monkeypatch):
    x = torch.randint(256, (1000, 1, 8, 8), dtype=torch.uint8)
    torch.manual_seed(0)
    batches = [common.sample_batch(x, 64, "cuda") for _ in range(50)]
    torch.manual_seed(0)
    for batch in batches:
        assert batch.is_cuda
        assert_close(batch.cpu(), common.sample_batch(x, 64), rtol=0, atol=1e-6)


@on_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", MODELS[:1], indirect=True)
def test_a_run_with_its_data_on_the_host(model, deterministic, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    whole = train(model, tmp_path / "whole", "--dataset", "ring", "--steps", "8")
    assert "stay on the host" in capsys.readouterr().err
    train(model, tmp_path / "parts", "--dataset", "ring", "--steps", "5")
    parts = train(model, tmp_path / "parts", "--resume", str(tmp_path / "parts"), "--steps", "8")
    assert_close(parts, whole, rtol=1e-3, atol=1e-4)


@on_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", MODELS[:1], indirect=True)
def test_too_large_a_batch(model, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags = ["--batch-size", "200000000", "--steps", "1", "--out", str(tmp_path / "run")]
        model.main([*flags, "--device", "cuda"])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and "--batch-size" in lines[0]
