"""What a CUDA graph forbids, looked for without a GPU: on meta tensors, operator by operator.

A meta tensor has a device that is not the host's and no numbers that one could wait for. All ATen calls of an
iteration are watched: none may touch a tensor of the host, and of none may the host need the result.
"""

from importlib import import_module
from inspect import signature

import pytest
import torch
from conftest import MODELS, random_set
from test_graph import VARIANTS, tensors, waits
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "conv": ([1, 16, 16],),
    "mlp": ([3, 16, 16], "--network", "mlp"),
    "points": ([2],),
}
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
FROM_THE_HOST = ("tensor", "as_tensor", "from_numpy")  # no operator tells of them


class Watch(TorchDispatchMode):
    """Notes operators that touch a tensor of the host, or whose result the host waits for."""

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.forget()

    def forget(self):
        self.on_host, self.mixed, self.waiting = set(), set(), set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen += 1
        if waits(operator, args):
            self.waiting.add(str(operator))
        missing = operator is torch.ops.aten._fused_adam_.tensor_lr  # there is none for meta tensors
        results = None if missing else operator(*args, **kwargs)
        places = {tensor.is_meta for tensor in tensors((args, kwargs, results))}
        if False in places and not operator.name().startswith("profiler::"):
            self.on_host.add(str(operator))
        if len(places) == 2 and operator not in COPIES:
            self.mixed.add(str(operator))
        return results


@pytest.fixture
def on_device(configure, monkeypatch):
    """on_device(model, shape, *flags) → config, test set on the host, what build() makes of sets on a device.

    The optimisers are those of a GPU: fused, and capturable where the model's file names that.
    """
    for module, name in {"optimizer": "fused_kernels", "rmsprop": "capturable"}.items():
        module = import_module(f"torch.optim.{module}")
        monkeypatch.setattr(module, f"_get_{name}_supported_devices", lambda: ["meta"])
    for rule in (torch.optim.Adam, torch.optim.RMSprop):

        def init(self, *args, made=rule.__init__, **settings):
            made(self, *args, **settings | {"capturable": "capturable" in settings})

        monkeypatch.setattr(rule, "__init__", init)

    def on_device(model, shape, *flags, test_on_host=False):
        config = configure(model, shape, *flags)
        vars(config).update(device="meta", critic_steps=1, pretrain_steps=1)
        torch.manual_seed(0)
        train_set, test_set = (random_set(100, shape, config.classes) for _ in range(2))
        there = {part.to("meta"): part for part in (*train_set, *test_set)}  # the same, on the device
        x_train, y_train, x_test, y_test = there
        if test_on_host:
            x_test, y_test = test_set
        with pytest.MonkeyPatch.context() as patch:  # build() may read the labels
            patch.setattr(torch.Tensor, "cpu", lambda tensor: there.get(tensor, tensor))
            return config, model.build(config, (x_train, y_train), (x_test, y_test))

    return on_device


def watched(watch, iteration):
    """The iteration: the first makes the optimisers' state, the second is watched, the third ends the run."""
    count = [0]

    def step():
        count[0] += 1
        if count[0] == 1:
            return iteration()
        if count[0] == 3:
            raise EOFError
        watch.forget()
        with pytest.MonkeyPatch.context() as patch:
            for name in FROM_THE_HOST:
                patch.setattr(torch, name, None)
            return iteration()

    return step


CASES = [(model, kind) for model in MODELS for kind in KINDS]
CASES += [(model, "conv", *flags) for model, *flags in VARIANTS if model in MODELS]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_step_of_the_loop_neither_touches_the_host_nor_waits(case, on_device, monkeypatch):
    name, kind, *flags = case
    model, watch = import_module(name), Watch()
    config, (nets, optimizers, iteration, pictures) = on_device(model, *KINDS[kind], *flags)
    monkeypatch.setattr(model, "save", lambda *_: None)
    with pytest.raises(EOFError), watch:
        model.train(config, nets, optimizers, watched(watch, iteration), pictures, None, False)
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    assert all(group["capturable"] and group["lr"].is_meta for group in groups)
    assert watch.seen > 100
    assert watch.on_host == watch.waiting == set()
    with torch.no_grad(), watch:
        grids = pictures(model.draw_z(16, config, torch.device("meta")))
    assert grids and all(x.is_meta for x, _ in grids.values())
    assert watch.mixed == set()


@pytest.mark.parametrize("name", MODELS)
def test_what_tools_use_stays_on_the_device_of_what_it_is_given(name, on_device):
    """Also pictures() of test items that stayed on the host, because they are too many."""
    model, watch, device = import_module(name), Watch(), torch.device("meta")
    config, (nets, _, _, pictures) = on_device(model, *KINDS["conv"], test_on_host=True)
    functions = [getattr(model, name) for name in ("encode", "features", "classify") if hasattr(model, name)]
    x = torch.empty(8, *config.shape, device=device)
    with torch.no_grad(), watch:
        z = model.draw_z(8, config, device)
        if "label" in signature(model.draw_z).parameters:
            z = model.draw_z(8, config, device, label=0)
        made = [model.generate(nets, z), *(function(nets, x) for function in functions)]
        made += [grid for grid, _ in pictures(z).values()]
    assert all(result.is_meta for result in made)
    assert watch.mixed == set()


# What the watch has to notice


def item(f):
    return f * (2 if f.mean().item() > 0 else 1)


def mask(f):
    return f[f > 0]


def tensor_of_the_host(f):
    return f * torch.ones(())


def new_tensor(f):
    return f * torch.tensor(2.0, device=f.device)


def index_of_the_host(f):
    return f[torch.arange(len(f))]


@pytest.mark.parametrize("mistake", [item, mask, tensor_of_the_host, new_tensor, index_of_the_host])
def test_a_mistake_is_noticed(mistake, on_device, monkeypatch):
    model, watch = import_module("wgan"), Watch()
    config, (nets, optimizers, iteration, pictures) = on_device(model, [2])
    critic_loss = model.critic_loss
    monkeypatch.setattr(model, "critic_loss", lambda f_real, f_fake: critic_loss(mistake(f_real), f_fake))
    monkeypatch.setattr(model, "save", lambda *_: None)
    with pytest.raises((RuntimeError, TypeError, EOFError)) as error, watch:
        model.train(config, nets, optimizers, watched(watch, iteration), pictures, None, False)
    assert watch.on_host or watch.waiting or error.type is TypeError  # torch.tensor was called
