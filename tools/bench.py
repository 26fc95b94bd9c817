"""python -m tools.bench [MODEL…]: how fast the training loops are on the device at hand.

Every figure is of a model file as it is: train() builds networks and iteration, and what it hands to run()
is timed here. Times of a step are medians of rounds in which all that is compared takes turns, so that what
else the machine does hits all alike; on CUDA they come from device events, and the time of the loop round the
step, by the clock on the wall, is the median of three runs.
"""

import io
import json
import math
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from common import load_data
from tools.runs import ROOT, Parser, model_names, whole
from tools.tables import aligned

ROUNDS = 7
COLUMNS = {  # key in a result: (title, unit, a factor for the table)
    "steps_per_s": ("steps/s", "", 1),
    "images_per_s": ("images/s", "", 1),
    "iteration_s": ("iteration", "ms", 1e3),
    "loop_s": ("loop", "ms", 1e3),
    "eager_s": ("eager", "ms", 1e3),
    "python_adds": ("Python adds", "%", 1e2),
    "gpu_busy": ("GPU busy", "%", 1e2),
    "host_s": ("data on host", "ms", 1e3),
    "baseline_s": ("baseline", "ms", 1e3),
    "times_faster": ("times faster", "", 1),
    "peak_bytes": ("peak memory", "MiB", 2**-20),
    "start_s": ("to step 1", "s", 1),
}
SETTINGS = ("dataset", "image_size", "batch_size", "width", "network")
SWEEP = {"batch_size": (0.5, 2, 4), "width": (0.5, 2), "image_size": (2,)}  # times the setting


# What is timed


def handed(model, config, x_train, x_test):
    """What train() hands to run(): config, nets, optimizers, iteration, pictures, saved, device, capture."""
    caught = []
    with patch.object(model, "run", lambda *args: caught.append(args)):
        model.train(config, x_train, x_test)
    return caught[0]


def recorded(iteration):
    """A function that replays the iteration as a CUDA graph, which is recorded as run() does it."""
    for _ in range(3):
        iteration()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
        iteration()
    return graph.replay


class Pictures(Dataset):
    """Pictures as most data sets give them: one by one, by way of PIL, scaled on the CPU."""

    def __init__(self, x):
        self.x = x.cpu()
        scale = transforms.Normalize(0.5, 0.5)
        self.transform = transforms.Compose([to_pil_image, transforms.ToTensor(), scale])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.transform(self.x[i]) if self.x.dtype == torch.uint8 else self.x[i]


def forever(loader):
    while True:
        yield from loader


def baseline(model, config, x_train, x_test):
    """A step of the same networks and mathematics in a plain loop, of the kind that tutorials have.

    Contiguous format, a DataLoader with two workers, the optimiser as it comes, gradients of all networks in
    every backward pass, losses read in every step. What run() switches on for a GPU is on here, too.
    """
    settings = {"shuffle": True, "num_workers": 2, "drop_last": True}
    batches = forever(DataLoader(Pictures(x_train), config.batch_size, **settings))
    to, backward, parameters = nn.Module.to, torch.Tensor.backward, []

    def contiguous(self, *args, memory_format=None, **kwargs):
        return to(self, *args, **kwargs)

    def by_default(optimizer, *args, fused=None, foreach=None, capturable=None, **settings):
        if torch.is_tensor(settings.get("lr")):  # on a GPU, Adam would wait for it at every weight
            settings["lr"] = settings["lr"].cpu()
        return optimizer(*args, **settings)

    def through_all(self, inputs=parameters, **kwargs):
        """The gradients of all networks, of which those that were not asked for are then dropped."""
        asked = {id(weight) for weight in inputs}
        others = [(weight, weight.grad) for weight in parameters if id(weight) not in asked]
        for weight, _ in others:
            weight.grad = None
        backward(self, **kwargs)
        for weight, grad in others:
            weight.grad = grad

    @contextmanager
    def plainly():
        with (
            patch.object(nn.Module, "to", contiguous),
            patch.object(torch.optim, "Adam", partial(by_default, torch.optim.Adam)),
            patch.object(torch.optim, "RMSprop", partial(by_default, torch.optim.RMSprop)),
            patch.object(torch.Tensor, "backward", through_all),
            patch.object(model, "sample_batch", lambda x, n, device: next(batches).to(device)),
        ):
            yield

    with plainly():
        _, nets, _, iteration, *_ = handed(model, config, x_train, x_test)
    parameters.extend(nets.parameters())

    def step():
        with plainly():
            return [value.item() for value in iteration().values()]

    return step


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


def loop_seconds(model, hands, steps):
    """Seconds per step of run() itself, logging and all: those of a long run less those of a short one."""
    config, nets, optimizers, iteration, pictures, _, device, capture = hands

    def whole_run(steps):
        with tempfile.TemporaryDirectory() as out, patch.object(sys, "stderr", io.StringIO()):
            vars(config).update(out=out, steps=steps, sample_every=10**9, save_every=10**9)
            start = time.perf_counter()
            model.run(config, nets, optimizers, iteration, pictures, None, device, capture)
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
    """The most memory that was in use until now: on CUDA the GPU's, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds_to_first_step(model, flags):
    """From the start of the command to the end of step 1, its pictures and checkpoint included."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, f"{model}.py", *flags, "--steps", "1", "--out", f"{out}/run"]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - start


def measure(name, flags, seconds, with_baseline, with_start):
    """The figures of one model with these flags, by the keys of COLUMNS; meant for a process of its own."""
    model = import_module(name)
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True  # as in run()
    config = model.parse_args(flags)
    if hasattr(config, "pretrain_steps"):  # a phase of its own, which is not timed
        config = model.parse_args(flags := [*flags, "--pretrain-steps", "0"])
    device = torch.device(config.device)
    source = partial(load_data, config.dataset, config.data_dir, image_size=config.image_size, device=device)
    data = [source(split=split)[0] for split in ("train", "test")]
    config.shape = list(data[0].shape[1:])
    hands = handed(model, config, *data)
    iteration, capture = hands[3], hands[-1]
    steps = {"iteration_s": iteration}
    if capture:
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())
        steps = {"iteration_s": recorded(iteration), "eager_s": iteration}
    clock(steps["iteration_s"], 3, device)
    peak = peak_bytes(device)  # before there is anything that the model does not need
    if capture:
        steps["host_s"] = handed(model, config, *(x.cpu() for x in data))[3]
    if with_baseline:
        steps["baseline_s"] = baseline(model, config, *data)
    result = race(steps, seconds, device)
    step = result["iteration_s"]
    if capture:
        n = math.ceil(seconds / step / 3)
        step = result["loop_s"] = median(loop_seconds(model, hands, n) for _ in range(3))
        result["python_adds"] = step / result["iteration_s"] - 1
        if share := busy(steps["iteration_s"]):  # a profiler without the right to look finds no kernels
            result["gpu_busy"] = share
    result |= {"steps_per_s": 1 / step, "images_per_s": config.batch_size / step, "peak_bytes": peak}
    if with_baseline:
        result["times_faster"] = result["baseline_s"] / step
    if with_start:
        result["start_s"] = seconds_to_first_step(name, flags)
    threads = f"{device}, {torch.get_num_threads()} threads"
    result["device"] = torch.cuda.get_device_name() if device.type == "cuda" else threads
    return {"model": name} | {key: getattr(config, key) for key in SETTINGS} | result


# The command


def table(results):
    """Lists of strings for tools.tables: a row a model, the columns that have a value."""
    columns = {key: column for key, column in COLUMNS.items() if any(key in result for result in results)}
    rows = [["model", *(f"{title} [{unit}]" if unit else title for title, unit, _ in columns.values())]]
    for result in results:
        values = {key: result[key] * factor for key, (_, _, factor) in columns.items() if key in result}
        rows.append([result["model"], *(f"{values[key]:.4g}" if key in values else "–" for key in columns)])
    return rows


def sweep_table(results):
    """A row for each setting: what a step costs, also as a multiple of the model's first, and as a power."""
    rows, base = [["model", "setting", "step [ms]", "× the cost", "power"]], {}
    for result in results:
        first = base.setdefault(result["model"], result)
        key = next((key for key in SWEEP if result[key] != first[key]), None)
        times = result["iteration_s"] / first["iteration_s"]
        power = f"{math.log(times) / math.log(result[key] / first[key]):.2f}" if key else "–"
        setting = f"{key.replace('_', ' ')} {result[key]}" if key else "as given"
        rows.append([result["model"], setting, f"{result['iteration_s'] * 1e3:.2f}", f"{times:.2f}", power])
    return rows


def tasks(name, options):
    """The arguments of measure for a model: one task, or with --sweep one for each setting."""
    flags = ["--device", options.device.type, "--seed", str(options.seed)]
    for key in ("data_dir", *SETTINGS):
        if getattr(options, key) is not None:
            flags += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    if not options.sweep:
        return [(name, flags, options.seconds, options.baseline, True)]
    config, variants = import_module(name).parse_args(flags), [[]]
    for key, factors in SWEEP.items():
        if key == "image_size" and config.dataset in import_module(name).VARIANTS["dataset"]:
            continue  # points have none
        values = {max(2, round(getattr(config, key) * factor)) for factor in factors} - {getattr(config, key)}
        variants += [[f"--{key.replace('_', '-')}", str(value)] for value in sorted(values)]
    return [(name, flags + variant, options.seconds, False, False) for variant in variants]


def in_a_process(task):
    """measure(*task) in a fresh process, so that memory is its own and nothing is left behind."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *task).result()


def main(argv=None):
    """Measure and print as the flags say; 2 if something could not be measured."""
    parser = Parser("bench", __doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", help="names of model files; all unless given")
    parser.add_argument("--dataset", help="as in the model files")
    parser.add_argument("--image-size", type=whole(1), help="pixels")
    parser.add_argument("--width", type=whole(1), help="as in the model files")
    parser.add_argument("--network", choices=("conv", "mlp"), help="kind of all networks")
    parser.add_argument("--seconds", type=whole(1), default=10, help="for each figure")
    parser.add_argument("--baseline", action="store_true", help="time a plain loop of the same networks too")
    parser.add_argument("--sweep", action="store_true", help="what other batches, widths and sizes cost")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_shared(batch_size=None)
    options, results = parser.parse_args(argv), []
    if options.sweep and options.baseline:
        parser.error("--sweep times the models alone: it does not go with --baseline")
    if options.json and not Path(options.json).resolve().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder")
    models = parser.known(options.models, model_names(), "model file")
    todo = [task for name in models for task in tasks(name, options)]
    for task in tqdm(todo, "measuring", disable=None):
        try:
            results.append(in_a_process(task))
        except torch.OutOfMemoryError:
            parser.complain(f"{task[0]} finds too little memory: take a smaller --batch-size or --width")
        except (OSError, ValueError) as error:  # of the flags, and so of all models alike
            parser.complain(error)
            break
    if not results:
        sys.exit(2)
    print(aligned(sweep_table(results) if options.sweep else table(results)))
    about = {"torch": torch.__version__, "date": str(date.today())}
    about |= {key: results[0][key] for key in ("device", "dataset", "image_size")}
    print("; ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items()))
    if options.json:
        Path(options.json).write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    if len(results) < len(todo):
        sys.exit(2)


if __name__ == "__main__":
    main()
