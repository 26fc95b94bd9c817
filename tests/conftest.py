"""What the tests of the model files share. A test that takes `model` is run for each file it names."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)  # the nets are tiny, and sums come out the same on every machine


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
        config.shape, config.out = list(shape), str(tmp_path / "run")
        return config

    return configure


@pytest.fixture
def start(configure, monkeypatch):
    """start(model, shape, *flags) → what train() hands to run(): .nets .optimizers .iteration .pictures

    Also .config; .x_train and .x_test, random unless given; .draws["z"] and .draws["x"], every batch of
    draw_z and sample_batch; .initial, the nets' `state`; .updates, for each step of an optimiser (its name,
    `state` before it, after it).
    """

    def start(model, shape, *flags, x_train=None, x_test=None):
        config = configure(model, shape, *flags)
        if list(shape) == [2]:
            x_train = torch.randn(50, 2) if x_train is None else x_train
            x_test = torch.randn(9, 2) if x_test is None else x_test
        else:
            x_train = torch.randint(256, (50, *shape), dtype=torch.uint8) if x_train is None else x_train
            x_test = torch.randint(256, (9, *shape), dtype=torch.uint8) if x_test is None else x_test
        found = SimpleNamespace(config=config, x_train=x_train, x_test=x_test, updates=[])

        def run(config, nets, optimizers, iteration, pictures, saved, device, capture):
            vars(found).update(nets=nets, optimizers=optimizers, iteration=iteration, pictures=pictures)

        def recorded(name, batches):
            function = getattr(model, name)

            def record(*args, **kwargs):
                batches.append(function(*args, **kwargs))
                return batches[-1]

            monkeypatch.setattr(model, name, record)
            return batches

        monkeypatch.setattr(model, "run", run)
        found.draws = {"z": recorded("draw_z", []), "x": recorded("sample_batch", [])}
        model.train(config, x_train, x_test)
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


def state(nets):
    """{network: ([weights], [gradients or None])}, copies."""

    def copied(tensor):
        return None if tensor is None else tensor.detach().clone()

    return {
        name: ([copied(p) for p in net.parameters()], [copied(p.grad) for p in net.parameters()])
        for name, net in nets.items()
    }


@pytest.fixture
def make_run(tmp_path):
    """make_run(model, shape, *flags, name="run", dataset=None) → the folder of an untrained, tiny run.

    Its weights are large enough to tell samples apart, and its batch norms have seen other statistics than
    0 and 1, so that eval mode can be told from train mode.
    """

    def make_run(model, shape, *flags, name="run", dataset=None):
        dataset = dataset or ("grid" if list(shape) == [2] else "glyphs")
        small = ["--dataset", str(dataset), "--image-size", str(shape[-1]), "--z-dim", "4", "--width", "4"]
        config = model.parse_args([*small, "--device", "cpu", *map(str, flags)])
        config.shape, out = list(shape), tmp_path / name
        torch.manual_seed(config.seed)
        nets = torch.nn.ModuleDict(model.networks(config))
        with torch.no_grad():
            for weight in (p for p in nets["generator"].parameters() if p.dim() > 1):
                weight.normal_(0, 0.5)
            model.generate(nets, model.draw_z(16, config, torch.device("cpu")))
        kept = {key: value for key, value in vars(config).items() if key not in ("out", "resume")}
        saved = {"model": config.model, "step": 7, "config": kept, "optimizers": {}, "rng": {}}
        saved["networks"] = {key: net.state_dict() for key, net in nets.items()}
        saved["fixed_z"] = model.draw_z(4, config, torch.device("cpu"))
        out.mkdir()
        torch.save(saved, out / "checkpoint.pt")
        return out

    return make_run
