"""The loop with a CUDA graph made of CPU operators: as there, addresses and Python's numbers are frozen.

Without a GPU this is as near as one gets to a captured run. `torch.cuda.CUDAGraph` is replaced by a tape of
all ATen calls of one iteration. Recording has no effect, replaying executes the tape and nothing else, so
that whatever an iteration does in Python happens once. A captured run has to be the eager one, bit for bit.
"""

import random
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import MODELS, random_set
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SHAPES = {"points": [2], "pictures": [1, 16, 16]}
STEPS = ["--steps", "8", "--log-every", "1", "--sample-every", "3"]
FALLING = ["--decay-start", "2", "--decay-end", "7"]  # step 4 is the first that is recorded
VARIANTS = [("wbli", "--constraint", "clip"), ("gm_wae", "--objective", "vae")]


class Graph(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph and of the block that records it."""

    def __init__(self):
        super().__init__()
        self.tape = []  # operator, its arguments, its results
        self.before = {}  # address: memory from outside the graph, and its content before the recording
        self.own = {}  # address: memory that belongs to the graph
        self.replays = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(operator, args):
            raise RuntimeError(f"{operator} waits for the device, which a capture does not permit")
        frozen = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        for memory in memories(frozen):
            if memory.data_ptr() not in self.own and memory.data_ptr() not in self.before:
                self.before[memory.data_ptr()] = memory, memory.clone()
        results = operator(*args, **kwargs)
        made = tree_map_only(torch.Tensor, torch.Tensor.detach, results)
        for memory in memories(made):
            if memory.data_ptr() not in self.before:
                self.own[memory.data_ptr()] = memory
        self.tape.append((operator, frozen, made))
        return results

    def __enter__(self):
        self.random_state = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.random_state)
        for memory, content in self.before.values():
            memory.copy_(content)

    @torch.no_grad()
    def replay(self):
        for memory in self.own.values():  # nothing may be left from the replay before
            torch.empty(0, dtype=torch.uint8).set_(memory).fill_(255)  # floats: NaN; integers: −1
        for operator, (args, kwargs), made in self.tape:
            results = operator(*args, **kwargs)
            for old, new in zip(tensors(made), tensors(results), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither in place nor a view
                    old.copy_(new)
        self.replays += 1


def waits(operator, args):
    """Whether the host needs a result of this operator before it can go on."""
    if operator is torch.ops.aten.index.Tensor:  # only a mask makes a result whose size is unknown
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(operator.tags)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memories(tree):
    return [tensor.untyped_storage() for tensor in tensors(tree) if tensor.numel()]


def one_hot(label, classes):
    """As PyTorch's on CUDA; that of the CPU reads the labels to check them."""
    return torch.zeros(*label.shape, classes, dtype=label.dtype).scatter_(-1, label.unsqueeze(-1), 1)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are recorded while a test runs; CUDA's are replaced, and work on the CPU."""
    made, stream, current = [], object(), [None]  # the stream made, and the one that is set

    class Noted(Graph):
        def __init__(self):
            super().__init__()
            made.append(self)

    def graph(graph, stream=None):
        assert stream is not None and stream is current[0]  # not the default one
        return graph

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Noted)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda new: current.__setitem__(0, new))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(nn.functional, "one_hot", one_hot)
    rule = import_module("torch.optim.rmsprop")  # PyTorch's; Adam's fused kernel does not ask
    monkeypatch.setattr(rule, "_get_capturable_supported_devices", lambda: ["cpu"])
    return made


@pytest.fixture
def run(configure, graphs, tmp_path):
    """run(model, shape, *flags, capture, change=None, saved=None) → what a run leaves: checkpoint, table.

    The optimisers are capturable, as on CUDA: their learning rate is a tensor. `change`, a function of nets,
    optimisers and iteration, returns another iteration.
    """

    def run(model, shape, *flags, capture, change=None, saved=None):
        config = configure(model, shape, *STEPS, *FALLING, *flags)
        config.out = str(tmp_path / ("captured" if capture else "eager"))
        torch.manual_seed(config.seed)
        sets = [random_set(100, shape, config.classes) for _ in range(2)]
        nets, optimizers, iteration, pictures = model.build(config, *sets)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["capturable"] = True
        if change:
            iteration = change(nets, optimizers, iteration)
        model.train(config, nets, optimizers, iteration, pictures, saved, capture)
        checkpoint = torch.load(Path(config.out, "checkpoint.pt"), weights_only=True)
        return checkpoint, Path(config.out, "metrics.csv").read_text()

    return run


def assert_same(captured, eager):
    parts = "networks", "optimizers", "rng"
    assert_close(
        *([checkpoint[part] for part in parts] for checkpoint, _ in (captured, eager)), rtol=0, atol=0
    )
    assert captured[1] == eager[1]


CASES = [(model, shape) for model in MODELS for shape in SHAPES]
CASES += [(model, "pictures", *flags) for model, *flags in VARIANTS if model in MODELS]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_captured_run_is_the_eager_one(case, run, graphs):
    name, shape, *flags = case
    model, shape = import_module(name), SHAPES[shape]
    eager = run(model, shape, *flags, capture=False)
    assert not graphs
    captured = run(model, shape, *flags, capture=True)
    assert [graph.replays for graph in graphs] == [5]  # steps 4 to 8
    assert_same(captured, eager)
    groups = [group for part in captured[0]["optimizers"].values() for group in part["param_groups"]]
    assert max(group["lr"].item() for group in groups) < 2e-5  # they have fallen to a hundredth


@pytest.mark.parametrize("first", [2, 3, 4, 6])
def test_a_captured_run_that_was_resumed_is_the_eager_one(first, run, graphs):
    """No step is lost or done twice: not the recorded one, and not the three real ones after a resume."""
    model = import_module("wgan")
    eager = run(model, [2], capture=False)
    saved, _ = run(model, [2], "--steps", first, capture=True)
    captured = run(model, [2], capture=True, saved=saved)
    replays = [max(0, first - 3), max(0, 8 - first - 3)]
    assert [graph.replays for graph in graphs] == [n for n in replays if n]
    assert_same(captured, eager)


# What a graph gets wrong, and the stand-in with it


def step_counted_in_python(nets, optimizers, iteration):
    count, weight = [0], next(nets.parameters())

    def step():
        count[0] += 1
        with torch.no_grad():
            weight.mul_(1 - 0.01 * count[0])
        return iteration()

    return step


def weights_in_new_memory(nets, optimizers, iteration):
    def step():
        metrics = iteration()
        for weight in nets["critic"].parameters():
            weight.data = weight.data.clamp(-0.005, 0.005)
        return metrics

    return step


def value_of_the_step_before(nets, optimizers, iteration):
    kept, weight = [torch.zeros(())], next(nets.parameters())

    def step():
        with torch.no_grad():
            weight.add_(kept[0], alpha=0.1)
        metrics = iteration()
        kept[0] = metrics["W"]
        return metrics

    return step


def memory_first_made_while_recording(nets, optimizers, iteration):
    averages, count, weight = [], [0], next(nets.parameters())

    def step():
        metrics = iteration()
        count[0] += 1
        if count[0] == 4:
            averages.append(weight.detach().clone())
        with torch.no_grad():
            for average in averages:
                weight.copy_(average.lerp_(weight, 0.1))
        return metrics

    return step


def number_drawn_by_python(nets, optimizers, iteration):
    weight = next(nets.parameters())
    draw = random.Random(0).random

    def step():
        with torch.no_grad():
            weight.mul_(1 - 0.01 * draw())
        return iteration()

    return step


def value_read_by_the_host(nets, optimizers, iteration):
    def step():
        metrics = iteration()
        metrics["W"] *= 1 if metrics["W"].item() > 0 else 2
        return metrics

    return step


@pytest.mark.parametrize(
    "change",
    [
        step_counted_in_python,
        weights_in_new_memory,
        value_of_the_step_before,
        memory_first_made_while_recording,
        number_drawn_by_python,
    ],
)
def test_what_python_does_once_is_noticed(change, run):
    model = import_module("wgan")
    eager = run(model, [2], capture=False, change=change)
    captured = run(model, [2], capture=True, change=change)
    with pytest.raises(AssertionError):
        assert_same(captured, eager)


def test_a_rate_that_is_no_tensor_is_noticed(run, monkeypatch):
    model = import_module("wgan")

    def set_rate(optimizers, config, step):
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = config.lr / step

    monkeypatch.setattr(model, "set_rate", set_rate)
    eager, captured = (run(model, [2], capture=capture) for capture in (False, True))
    with pytest.raises(AssertionError):
        assert_same(captured, eager)


def test_waiting_for_the_device_is_noticed(run):
    with pytest.raises(RuntimeError, match="waits for the device"):
        run(import_module("wgan"), [2], capture=True, change=value_read_by_the_host)


def test_without_a_gpu_nothing_is_captured(graphs, tmp_path, monkeypatch):
    model, captured = import_module("wgan"), []
    monkeypatch.setattr(model, "train", lambda *args, capture: captured.append(capture))
    model.main(["--dataset", "ring", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert captured == [False]
