"""Training model files: with gradients logged, and in chunks that leave a checkpoint each."""

import shutil
import sys
from contextlib import contextmanager, redirect_stdout
from importlib import import_module

import torch
from torch import nn

from tools.runs import load_sets


class Diverged(ValueError):
    """A loss or weights were no longer finite."""


def train(name, flags, path, with_gradients=False):
    """Train a model file into this folder, or what is left to do there; False if it diverged.

    `with_gradients` logs the norms of the gradients of generator and encoder as well.
    """
    model = import_module(name)
    begun = (path / "checkpoint.pt").exists()
    flags = [*flags, "--resume" if begun else "--out", str(path)]
    config, saved = model.parse_args(flags), None
    if begun:
        saved, config = model.load_checkpoint(config, flags)
        if saved["step"] >= config.steps:
            return True
    train_set, test_set = load_sets(config)
    torch.manual_seed(config.seed)
    parts = model.build(config, train_set, test_set)
    if with_gradients:
        parts = logging_gradients(*parts)
    try:
        with restored(), redirect_stdout(sys.stderr):
            model.train(config, *parts, saved, capture=train_set[0].is_cuda)
    except SystemExit as stop:
        if stop.code != 1:
            raise
        return False
    return True


def logging_gradients(nets, optimizers, iteration, pictures):
    """The parts of a run; its iteration gives the norms of the gradients that G and E step with, too."""
    norms = {}

    def note(name, optimizer):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norms[f"gradient of {name}"] = nn.utils.get_total_norm([weight.grad for weight in weights])

    for name in ("generator", "encoder"):
        if name in optimizers:
            optimizers[name].register_step_pre_hook(
                lambda optimizer, args, kwargs, name=name: note(name, optimizer)
            )
    return nets, optimizers, lambda: iteration() | norms, pictures


def check_flags(name, flags, path):
    """ValueError if a run was begun there with other flags; the number of steps may differ."""
    if (path / "checkpoint.pt").exists():
        model, given = import_module(name), [*flags, "--resume", str(path)]
        model.load_checkpoint(model.parse_args(given), given)


def chunks(name, flags, path, steps, every):
    """Train so many steps in chunks, which is exact; yields (step, a folder with a copy of the checkpoint).

    Chunks that an earlier call has done are not done again. Diverged if the training does; ValueError if it
    has gone past a chunk without leaving its checkpoint, or was begun there with other flags.
    """
    check_flags(name, flags, path)
    for step in [*range(every, steps, every), steps]:
        kept = path / "checkpoints" / f"{step:07d}"
        if not (kept / "checkpoint.pt").exists():
            if not train(name, [*flags, "--steps", str(step)], path):
                raise Diverged(f"{path} diverged before step {step}")
            reached = torch.load(path / "checkpoint.pt", "cpu", weights_only=True)["step"]
            if reached != step:
                raise ValueError(f"{path} is at step {reached} and has left no checkpoint at {step}")
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(path / "checkpoint.pt", kept / "unfinished")
            (kept / "unfinished").replace(kept / "checkpoint.pt")
        yield step, kept


@contextmanager
def restored():
    """Afterwards the switches that a training sets are as before, for the evaluation."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, matmul.allow_tf32
    try:
        yield
    finally:
        cudnn.benchmark, matmul.allow_tf32 = before
        if torch.cuda.is_initialized():
            torch.cuda.set_stream(torch.cuda.default_stream())
