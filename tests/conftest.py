"""What the tests share: the models and what each can do, and fixtures that build, start and save them.

A test that takes `model` is run for each file it names; `from conftest import MODELS, having` gives the
names.
"""

import csv
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools import sync

MODELS = [name for name in sync.MODELS if (sync.ROOT / f"{name}.py").exists()]
NEED_LABELS = ["cgan", "semi_gan"]  # they refuse a data set without
SOLO = MODELS[0]  # for what only the run part does, which is the same everywhere

torch.set_num_threads(1)  # the nets are tiny, and sums come out the same on every machine


def having(*names):
    """The models with all of these functions or settings: having("encode"), having("critic_steps")."""
    modules = {model: import_module(model) for model in MODELS}
    return [
        model
        for model, module in modules.items()
        if all(hasattr(module, name) or name in module.DEFAULTS for name in names)
    ]


def run_main(model, *flags):
    """`python model.py flags`, in this process."""
    import_module(model).main([str(flag) for flag in flags])


def run_stops(code, model, *flags):
    """run_main, which has to end with this exit code."""
    with pytest.raises(SystemExit) as stopped:
        run_main(model, *flags)
    assert stopped.value.code == code


def checkpoint(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def rows(out):
    """metrics.csv as dictionaries."""
    return list(csv.DictReader((Path(out) / "metrics.csv").read_text().splitlines()))


def files(folder):
    """{path: bytes, or None for a folder} of everything below a folder."""
    below = Path(folder).rglob("*")
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in below}


def differences(a, b, where=""):
    """The places at which two checkpoints are not the same to the bit."""
    if type(a) is not type(b):
        return [f"{where}: {type(a)} {type(b)}"]
    if isinstance(a, dict):
        keys = [f"{where}: {list(a)} {list(b)}"] if list(a) != list(b) else []
        common = a.keys() & b.keys()
        return keys + [d for key in common for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, pair in pairs for d in differences(*pair, f"{where}/{i}")]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    return [] if a == b else [f"{where}: {a} {b}"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def little_pretraining(request, monkeypatch):
    """GM-WAE's pre-training is short where it is not what is tested."""
    if request.module.__name__ != "test_gm_wae":
        monkeypatch.setitem(import_module("gm_wae").DEFAULTS, "pretrain_steps", 10)


@pytest.fixture
def model(request):
    """The module called by the parameter, as in parametrize("model", ["wgan", "wbli"], indirect=True)."""
    return import_module(request.param)


@pytest.fixture
def configure(tmp_path):
    """configure(model, shape, *flags) → a small configuration of this model; points if the shape is [2]."""

    def configure(model, shape, *flags):
        dataset = "grid" if list(shape) == [2] else "glyphs"
        small = ["--dataset", dataset, "--z-dim", "5", "--width", "4", "--batch-size", "6", "--device", "cpu"]
        config = model.parse_args([*small, *map(str, flags)])
        config.shape = list(shape)
        config.classes = 25 if dataset == "grid" else 10
        config.out = str(tmp_path / "run")
        return config

    return configure


def random_set(n, shape, classes):
    """n random items as load_data gives them: bytes or points, and balanced labels in random order."""
    x = torch.randn(n, 2) if list(shape) == [2] else torch.randint(256, (n, *shape), dtype=torch.uint8)
    return x, random_labels(n, classes)


def random_labels(n, classes):
    return (torch.arange(n) % classes)[torch.randperm(n)] if classes else None


def state(nets):
    """{network: ([weights], [gradients or None])}, copies."""

    def copied(tensor):
        return None if tensor is None else tensor.detach().clone()

    return {
        name: ([copied(p) for p in net.parameters()], [copied(p.grad) for p in net.parameters()])
        for name, net in nets.items()
    }


@pytest.fixture
def start(configure, monkeypatch):
    """start(model, shape, *flags) → what build() returns: .nets .optimizers .iteration .pictures

    Also .config; .x_train and .x_test, random unless given, .y_train and .y_test, random and balanced;
    .draws["z"], .draws["x"] and .draws["y"], every batch of draw_z and sample_batch, those of build()
    included; .initial, the nets' `state`; .updates, for each step of an optimiser (its name, `state` before
    it, after it).
    """

    def start(model, shape, *flags, x_train=None, x_test=None):
        config = configure(model, shape, *flags)
        train_set = random_set(50, shape, config.classes)
        test_set = random_set(9, shape, config.classes)
        if x_train is not None:
            train_set = x_train, random_labels(len(x_train), config.classes)
        if x_test is not None:
            test_set = x_test, random_labels(len(x_test), config.classes)
        found = SimpleNamespace(config=config, updates=[], draws={"z": [], "x": [], "y": []})
        found.x_train, found.y_train = train_set
        found.x_test, found.y_test = test_set
        draw_z, sample_batch = model.draw_z, model.sample_batch

        def drawn_z(*args, **kwargs):
            z = draw_z(*args, **kwargs)
            found.draws["z"].append(z)
            return z

        def drawn_batch(*args, **kwargs):
            batch = sample_batch(*args, **kwargs)
            if isinstance(batch, tuple):
                found.draws["x"].append(batch[0])
                found.draws["y"].append(batch[1])
            else:
                found.draws["x"].append(batch)
            return batch

        monkeypatch.setattr(model, "draw_z", drawn_z)
        monkeypatch.setattr(model, "sample_batch", drawn_batch)
        torch.manual_seed(config.seed)
        parts = model.build(config, train_set, test_set)
        found.nets, found.optimizers, found.iteration, found.pictures = parts
        found.initial = state(found.nets)
        for name, optimizer in found.optimizers.items():
            optimizer.register_step_pre_hook(
                lambda *_, name=name: found.updates.append((name, state(found.nets)))
            )
            optimizer.register_step_post_hook(
                lambda *_: found.updates.append((*found.updates.pop(), state(found.nets)))
            )
        return found

    return start


@pytest.fixture
def make_run(tmp_path):
    """make_run(model, shape, *flags, name="run", dataset=None, classes=None) → a tiny untrained run's folder.

    The model's own build() and save() make it, as if at step 7. Its weights are large enough to tell samples
    apart, and its batch norms have seen other statistics than 0 and 1, so that eval mode can be told from
    train mode.
    """

    def make_run(model, shape, *flags, name="run", dataset=None, classes=None):
        dataset = dataset or ("grid" if list(shape) == [2] else "glyphs")
        small = ["--dataset", dataset, "--image-size", shape[-1], "--z-dim", 4, "--width", 4]
        small += ["--device", "cpu", "--out", tmp_path / name]
        config = model.parse_args([str(flag) for flag in (*small, *flags)])
        config.shape = list(shape)
        if classes is None:
            classes = {"grid": 25, "ring": 8, "swissroll": None}.get(dataset, 10)
        config.classes = classes
        sets = [random_set(200, shape, classes) for _ in range(2)]
        torch.manual_seed(config.seed)
        nets, optimizers, _, _ = model.build(config, *sets)
        with torch.no_grad():
            for weight in (p for p in nets["generator"].parameters() if p.dim() > 1):
                weight.normal_(0, 0.5)
            model.generate(nets, model.draw_z(16, config, torch.device("cpu")))
        fixed_z = model.draw_z(4, config, torch.device("cpu"))
        model.claim(tmp_path / name, step=0).close()
        model.save(7, config, nets, optimizers, fixed_z)
        return tmp_path / name

    return make_run
