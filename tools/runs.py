"""What the tools share: their command lines, opening a run, drawing from it.

A run is used through the public names of its model file alone, so that a new model needs no change here.
A user's mistake raises ValueError or OSError with one sentence that says what to do.
"""

import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from tqdm import tqdm

from common import as_float, load_data

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ("mnist", "glyphs", "color_mnist", "stacked_mnist")  # sets whose classes are digits
CHECKPOINT = {"model", "step", "config", "networks", "fixed_z"}  # what the tools read of one
CONFIG = ("shape", "prior", "dataset", "data_dir", "image_size", "seed")  # and of its flags


@dataclass
class Run:
    """An opened run: its folder, model file, flags, step and networks, which are in eval mode on `device`."""

    path: Path
    model: ModuleType
    config: Namespace
    step: int
    nets: nn.ModuleDict
    device: torch.device

    @property
    def images(self):
        """Whether x are pictures, not points."""
        return len(self.config.shape) == 3

    def has(self, name):
        """Whether the model file has this public function: `encode`, `component_probabilities`, …"""
        return hasattr(self.model, name)

    @property
    def components(self):
        """The number of components of the prior; 0 if its z cannot be drawn from one of them."""
        if "component" not in signature(self.model.draw_z).parameters:
            return 0
        x = torch.zeros(1, *self.config.shape, device=self.device)
        with torch.no_grad():
            return self.model.component_probabilities(self.nets, x).shape[1]


# Opening


def model_names():
    """The model files beside common.py: those that define networks()."""
    paths = [path for path in ROOT.glob("*.py") if path.stem != "common"]
    return sorted(p.stem for p in paths if re.search(r"^def networks\(", p.read_text("utf-8"), re.MULTILINE))


def open_run(path, device):
    """The run in this folder, as its checkpoint has it."""
    saved, path = load_checkpoint(path), Path(path)
    model = import_module(saved["model"])
    try:
        config = Namespace(**saved["config"])
        for name in CONFIG:
            getattr(config, name)
        nets = fresh_networks(model, config, device)
        for name, net in nets.items():
            net.load_state_dict(saved["networks"][name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise ValueError(
            f"{path} does not fit {model.__name__}.py as it is here ({reason}); the run's own copy does"
        ) from error
    return Run(path, model, config, saved["step"], nets, torch.device(device))


def load_checkpoint(path):
    """The dictionary in a run's checkpoint.pt, of a model that there is here."""
    file = Path(path) / "checkpoint.pt"
    if not file.is_file():
        raise ValueError(f"{path} holds no run: it has no checkpoint.pt")
    saved = load_tensors(file)
    if not isinstance(saved, dict) or not saved.keys() >= CHECKPOINT:
        raise ValueError(f"{file} is not the checkpoint of a run")
    if saved["model"] not in (known := model_names()):
        raise ValueError(f"{file} is of a model called {saved['model']!r}; known are {', '.join(known)}")
    return saved


def load_tensors(file):
    """What torch.save wrote: tensors and plain values, nothing that could run."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a truncated or foreign file raises has no common class
        raise ValueError(f"{file} is damaged or was not written by a run") from error


def fresh_networks(model, config, device):
    """The networks that this configuration starts from, its seed given, in eval mode."""
    with seeded(config.seed):
        nets = nn.ModuleDict(model.networks(config))
    return nets.to(device, memory_format=torch.channels_last).eval()


def load_split(run, split, data_dir=None):
    """x and y of a split of the run's data, as load_data gives them, on the host."""
    config = run.config
    return load_data(config.dataset, data_dir or config.data_dir, split, config.image_size, "cpu")


# Drawing


@contextmanager
def seeded(seed):
    """Inside, torch's random numbers follow from the seed; outside, nothing has changed."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def draw_z(run, n, seed, component=None):
    """n draws from the run's prior, on the host: they depend on the seed, not on device or batch size."""
    chosen = {} if component is None else {"component": component}
    with seeded(seed):
        return run.model.draw_z(n, run.config, torch.device("cpu"), **chosen)


@torch.no_grad()
def in_batches(function, x, batch_size, device, task=None):
    """function(x), some items at a time on the device, gathered on the host; `task` gets a progress bar.

    Pictures may come as bytes: the function sees floats in [−1, 1].
    """
    batches = tqdm(x.split(batch_size), task, disable=None if task else True, leave=False)
    return torch.cat([function(as_float(batch).to(device)).cpu() for batch in batches])


def samples(run, z, batch_size, task=None):
    """G(z) as a data set has it: bytes (N, C, H, W) for pictures, float32 (N, 2) for points."""
    return in_batches(lambda z: as_data(run.model.generate(run.nets, z)), z, batch_size, run.device, task)


def reconstructions(run, x, batch_size, task=None):
    """G(E(x)) of x as a data set has it, in the same form."""
    model, nets = run.model, run.nets
    return in_batches(
        lambda x: as_data(model.generate(nets, model.encode(nets, x))), x, batch_size, run.device, task
    )


def probabilities(run, x):
    """q(k|x) of x as a data set has it: (N, K)."""
    return in_batches(lambda x: run.model.component_probabilities(run.nets, x), x, 500, run.device)


def codes(run, x):
    """E(x) of x as a data set has it: (N, z_dim)."""
    return in_batches(lambda x: run.model.encode(run.nets, x), x, 500, run.device)


def as_data(x):
    """The inverse of common.as_float, as save_grid rounds: −1 ↦ 0, 1 ↦ 255; points stay as they are."""
    return x if x.dim() == 2 else ((x + 1) * 127.5).round().clamp(0, 255).byte()


# Command lines


class Parser(ArgumentParser):
    """A parser with the flags that the tools share; a mistake is one line on stderr and exit code 2."""

    def __init__(self, tool, description):
        super().__init__(
            prog=f"python -m tools.{tool}",
            description=description,
            formatter_class=ArgumentDefaultsHelpFormatter,
        )
        self.tool, self.failed = tool, False

    def add_shared(self, batch_size):
        """The flags at the end of every tool's."""
        self.add_argument("--seed", type=whole(0), default=0, help="fixes everything random")
        self.add_argument("--batch-size", type=whole(1), default=batch_size, help="items at a time")
        self.add_argument("--data-dir", help="where the data lie, if no longer where the run found them")
        self.add_argument(
            "--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: a GPU if any"
        )

    def parse_args(self, argv=None):
        """The flags, `device` as a torch.device."""
        options = super().parse_args(argv)
        gpu = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
        device = gpu if options.device == "auto" else options.device
        if device not in ("cpu", gpu):
            self.error(f"--device {device}: PyTorch finds none on this machine")
        options.device = torch.device(device)
        return options

    def known(self, chosen, names, kind):
        """The chosen of these names, all unless any is chosen."""
        if unknown := [name for name in chosen if name not in names]:
            self.error(f"{unknown[0]} is no {kind}; known are {', '.join(names)}")
        return chosen or [*names]

    def needs(self, *packages):
        """Stop now, not after minutes, if one of these is not installed."""
        for package in packages:
            if find_spec(package) is None:
                self.error(f"{package} is missing: pip install -r requirements-dev.txt")

    def complain(self, message):
        """One line on stderr; `failed` is true from now on."""
        message, self.failed = " ".join(str(message).split()), True
        tqdm.write(f"tools.{self.tool}: error: {message}", file=sys.stderr)

    def error(self, message):
        """One line on stderr, and out."""
        self.complain(message)
        sys.exit(2)


def whole(least):
    """A type of argparse: a whole number from `least` on."""

    def number(text):
        if not least <= int(text) < 2**63:
            raise ValueError
        return int(text)

    number.__name__ = f"whole number from {least}"
    return number
