"""What tools.bench times: the step of a model file, its loop, and a plain loop of the same mathematics."""

import io
import math
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from importlib import import_module
from statistics import median
from unittest.mock import patch

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from tools import floor
from tools.runs import ROOT, load_sets

ROUNDS = 7

# A plain loop


class Pictures(Dataset):
    """Pictures as most data sets give them: one by one, by way of PIL, scaled on the CPU."""

    def __init__(self, x, y):
        self.x, self.y = x.cpu(), y if y is None else y.cpu()
        scale = transforms.Normalize(0.5, 0.5)
        self.transform = transforms.Compose([to_pil_image, transforms.ToTensor(), scale])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = self.transform(self.x[i]) if self.x.dtype == torch.uint8 else self.x[i]
        return x, 0 if self.y is None else self.y[i]


class Loaded:
    """Stands in for the tensor of a data set: once it has a `source`, an index gives that's next batch."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.source = None

    def __len__(self):
        return len(self.tensor)

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    def __getitem__(self, index):
        return self.tensor[index] if self.source is None else self.source()


def baseline(model, config, train_set, test_set):
    """A step of the same networks and mathematics in a plain loop, of the kind that tutorials have.

    Contiguous format, a DataLoader with two workers, the optimiser as it comes, gradients of all networks in
    every backward pass, losses read in every step.
    """
    pictures = Pictures(*train_set)
    if len(pictures) < config.batch_size:
        few = f"--baseline: {config.dataset} has {len(pictures)} training items"
        raise ValueError(f"{few}, too few for a batch of {config.batch_size}")
    x, y = (None if part is None else Loaded(part) for part in (pictures.x, pictures.y))
    nets, optimizers, iteration, _ = model.build(config, (x, y), test_set)
    nets.to(memory_format=torch.contiguous_format)
    for name, optimizer in optimizers.items():
        optimizers[name] = by_default(optimizer)
    parameters = list(nets.parameters())

    def batches():
        while True:
            yield from DataLoader(pictures, config.batch_size, shuffle=True, num_workers=2, drop_last=True)

    endless, labels = batches(), []

    def next_x():
        batch, labels[:] = next(endless)
        return batch

    x.source = next_x
    if y is not None:
        y.source = lambda: torch.stack(labels)

    backward = torch.Tensor.backward

    def through_all(self, inputs=parameters, **kwargs):
        """The gradients of all networks, of which those that were not asked for are then dropped."""
        asked = {id(weight) for weight in inputs}
        others = [(weight, weight.grad) for weight in parameters if id(weight) not in asked]
        for weight, _ in others:
            weight.grad = None
        backward(self, **kwargs)
        for weight, grad in others:
            weight.grad = grad

    def step():
        with patch.object(torch.Tensor, "backward", through_all):
            return [value.item() for value in iteration().values()]

    return step


def by_default(optimizer):
    """The same rule for the same weights, without what makes it fast: neither fused nor capturable."""
    fast = ("fused", "foreach", "capturable")
    groups = [{k: v for k, v in group.items() if k not in fast} for group in optimizer.param_groups]
    return type(optimizer)(groups)


# Timing


def clock(step, n, device):
    """Seconds for n calls."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(n):
            step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3
    start = time.perf_counter()
    for _ in range(n):
        step()
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start


def race(steps, seconds, device):
    """{name: median seconds per call} of functions that take turns for some seconds each, after a warm-up."""
    calls = {}
    for name, step in steps.items():
        clock(step, 3, device)
        calls[name] = max(1, math.ceil(seconds / ROUNDS / clock(step, 1, device)))
    times = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(clock(step, calls[name], device) / calls[name])
    return {name: median(values) for name, values in times.items()}


def loop_seconds(model, config, parts, steps):
    """Seconds per step of train() itself, logging and all: those of a long run less those of a short one."""

    def whole_run(steps):
        with tempfile.TemporaryDirectory() as out, redirect_stderr(io.StringIO()):
            vars(config).update(out=out, steps=steps, sample_every=10**9, save_every=10**9)
            start = time.perf_counter()
            model.train(config, *parts, None, capture=True)
            return time.perf_counter() - start

    short = 5  # the capture's own steps
    whole_run(short)  # what is done only once, like cuDNN's choice of kernels, is in none of the two
    return (whole_run(short + steps) - whole_run(short)) / steps


def busy(replay, n=20):
    """The share of the time in which one of the GPU's kernels is running, while a graph is replayed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(n):
            replay()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return covered([(event.time_range.start, event.time_range.end) for event in kernels]) if kernels else None


def covered(spans):
    """The share of the time from the first start to the last end that lies in one of these (start, end)."""
    spans = sorted(spans)
    running, until = 0, spans[0][0]
    for start, end in spans:
        running += max(0, end - max(start, until))
        until = max(until, end)
    return running / (until - spans[0][0])


def peak_bytes(device):
    """The most memory until now: on CUDA what tensors took and what PyTorch held, else the process's."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_bytes": allocated, "reserved_bytes": reserved}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": peak * (1 if sys.platform == "darwin" else 1024)}


def seconds_to_first_step(model, flags):
    """From the start of the command to the end of step 1, its pictures and checkpoint included."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, f"{model}.py", *flags, "--steps", "1", "--out", f"{out}/run"]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - start


def limits(device):
    """FLOP and bytes per second of a large matrix product and a large copy on this GPU."""
    n = 8192
    a, b = torch.rand(2, n, n, device=device)
    times = race({"product": lambda: a @ b, "copy": lambda: a.copy_(b)}, 1, device)
    return 2 * n**3 / times["product"], 2 * a.nbytes / times["copy"]


def measure(name, flags, seconds, with_baseline, with_start):
    """The figures of one model with these flags, by the keys of bench.COLUMNS; for a process of its own."""
    model = import_module(name)
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True  # as in train()
    config = model.parse_args(flags)
    if hasattr(config, "pretrain_steps"):  # a phase of its own, which is not timed
        flags = [*flags, "--pretrain-steps", "0"]
        config = model.parse_args(flags)
    device = torch.device(config.device)
    train_set, test_set = load_sets(config)
    capture = train_set[0].is_cuda

    def parts(on=device):
        torch.manual_seed(config.seed)
        x, y = train_set
        return model.build(config, (x.to(on), y if y is None else y.to(on)), test_set)

    ours = parts()
    iteration = ours[2]
    steps = {"iteration_s": iteration}
    if capture:
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())
        clock(iteration, 3, device)  # they make the state that the graph works on
        steps = {"iteration_s": model.recorded(iteration), "eager_s": iteration}
    clock(steps["iteration_s"], 3, device)
    memory = peak_bytes(device)  # before there is anything that the model does not need
    if capture:
        steps["host_s"] = parts("cpu")[2]
    if with_baseline:
        steps["baseline_s"] = baseline(model, config, train_set, test_set)
    result = race(steps, seconds, device) | memory
    step = result["iteration_s"]
    kernels = floor.counted(iteration)
    result["kernels"] = len(kernels)
    result["flops"], result["bytes"] = map(sum, zip(*kernels, strict=True))
    if capture:
        result["floor_s"] = floor.seconds(kernels, *limits(device))
        result["of_floor"] = result["floor_s"] / step
        n = math.ceil(seconds / step / 3)
        step = result["loop_s"] = median(loop_seconds(model, config, ours, n) for _ in range(3))
        result["python_adds"] = step / result["iteration_s"] - 1
        share = busy(steps["iteration_s"])
        if share:  # a profiler without the right to look finds no kernels
            result["gpu_busy"] = share
    result |= {"steps_per_s": 1 / step, "images_per_s": config.batch_size / step}
    if with_baseline:
        result["times_faster"] = result["baseline_s"] / step
    if with_start:
        result["start_s"] = seconds_to_first_step(name, flags)
    threads = f"{device}, {torch.get_num_threads()} threads"
    result["device"] = torch.cuda.get_device_name() if device.type == "cuda" else threads
    settings = ("dataset", "image_size", "batch_size", "width", "network")
    return {"model": name} | {key: getattr(config, key) for key in settings} | result
