"""Opening a run and drawing from it.

A run is used through the public names of its model file alone, so that a new model needs no change here.
A user's mistake raises ValueError or OSError with one sentence that says what to do.
"""

import re
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from tqdm import tqdm

from common import as_float, load_data
from tools.flags import memory_is_full

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = {"model": str, "step": int, "config": dict, "networks": dict}  # what the tools read of one


@dataclass
class Run:
    """An opened run; `name` is that of its model file, the networks are in eval mode on `device`."""

    path: Path
    name: str
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
        """Whether the model file has this public function: `encode`, `classify`, …"""
        return hasattr(self.model, name)

    @property
    def labels(self):
        """How many classes, codes or components samples can be asked for; 0 if draw_z takes no label."""
        if "label" not in signature(self.model.draw_z).parameters:
            return 0
        if not self.has("classify"):
            return self.config.classes
        x = torch.zeros(1, *self.config.shape, device=self.device)
        with torch.no_grad():
            return self.model.classify(self.nets, x).shape[1]

    @property
    def conditional(self):
        """Whether the labels that samples can be asked for are the data's: they need no classify() then."""
        return self.labels > 0 and not self.has("classify")


# Opening


def model_names():
    """The model files beside common.py: those that define networks()."""
    paths = [path for path in ROOT.glob("*.py") if path.stem != "common"]
    return sorted(p.stem for p in paths if re.search(r"^def networks\(", p.read_text("utf-8"), re.MULTILINE))


def open_run(path, device):
    """The run in this folder, as its checkpoint has it."""
    path, device = Path(path), torch.device(device)
    saved = load_checkpoint(path)
    name = saved["model"]
    model = import_module(name)
    try:
        config = Namespace(**saved["config"])
        run = Run(path, name, model, config, saved["step"], fresh_networks(model, config, device), device)
        for key, net in run.nets.items():
            net.load_state_dict(saved["networks"][key])
        made = samples(run, draw_z(run, 2, seed=0), 2).shape[1:]  # as a trial
        if not (made == (*config.shape,) and isinstance(config.dataset, str) and config.image_size > 0):
            raise ValueError(f"its samples are {tuple(made)}")
    except Exception as error:  # what wrong contents raise has no common class
        if memory_is_full(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
        advice = f"does not fit {name}.py as it is here ({reason}); the run's own copy may"
        raise ValueError(f"{path} {advice}") from error
    return run


def load_checkpoint(path):
    """The dictionary in a run's checkpoint.pt, of a model that there is here."""
    file = Path(path) / "checkpoint.pt"
    if not file.is_file():
        raise ValueError(f"{path} holds no run: it has no checkpoint.pt")
    saved = load_tensors(file)
    if not isinstance(saved, dict) or any(type(saved.get(key)) is not of for key, of in CHECKPOINT.items()):
        raise ValueError(f"{file} is not the checkpoint of a run")
    known = model_names()
    if saved["model"] not in known:
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


def load_sets(config):
    """Training and test set, each (x, y), for a model file's flags, which learn their shape and classes."""
    where = {"data_dir": config.data_dir, "image_size": config.image_size, "device": config.device}
    train_set, test_set = (load_data(config.dataset, split=split, **where) for split in ("train", "test"))
    x, y = train_set
    config.shape = list(x.shape[1:])
    config.classes = None if y is None else int(y.max()) + 1
    return train_set, test_set


def load_split(run, split, data_dir):
    """x and y of a split of the run's data, as load_data gives them, on the host."""
    config = run.config
    before = getattr(config, "data_dir", data_dir)
    try:
        x, y = load_data(config.dataset, data_dir, split, config.image_size, "cpu")
    except (OSError, ValueError) as error:
        hint = "" if before == data_dir else f" (the run had --data-dir {before})"
        raise ValueError(f"{error}{hint}") from error
    if list(x.shape[1:]) != list(config.shape):
        found, learnt = ("×".join(map(str, shape)) for shape in (x.shape[1:], config.shape))
        raise ValueError(f"{config.dataset} has items of {found}, but {run.path} has learnt {learnt}")
    return x, y


# Drawing


@contextmanager
def seeded(seed):
    """Inside, torch's random numbers follow from the seed; outside, nothing has changed."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def draw_z(run, n, seed, label=None):
    """n draws from the run's prior, on the host: they depend on the seed, not on device or batch size."""
    chosen = {} if label is None else {"label": label}
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

    def reconstructed(x):
        return as_data(model.generate(nets, model.encode(nets, x)))

    return in_batches(reconstructed, x, batch_size, run.device, task)


def probabilities(run, x):
    """What classify() gives for x as a data set has it: (N, K)."""
    return in_batches(lambda x: run.model.classify(run.nets, x), x, 500, run.device)


def codes(run, x):
    """E(x) of x as a data set has it: (N, z_dim)."""
    return in_batches(lambda x: run.model.encode(run.nets, x), x, 500, run.device)


def as_data(x):
    """The inverse of common.as_float, as save_grid rounds: −1 ↦ 0, 1 ↦ 255; points stay as they are."""
    return x if x.dim() == 2 else ((x + 1) * 127.5).round().clamp(0, 255).byte()
