"""BiGAN: one forward pass for three updates, the paper's networks, codes; its losses: test_objectives.py."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bigan

POINTS, GREY, COLOUR = [2], [1, 8, 8], [3, 8, 8]
CASES = [(COLOUR, []), (GREY, ["--network", "mlp"]), (POINTS, [])]
each_case = pytest.mark.parametrize("shape, flags", CASES, ids=["conv", "mlp", "points"])


def of_kind(net, *kinds):
    return [module for module in net.modules() if isinstance(module, kinds)]


# The update


@pytest.fixture
def double(monkeypatch):
    """Everything in float64."""
    sample_batch = bigan.sample_batch
    monkeypatch.setattr(bigan, "sample_batch", lambda *args: sample_batch(*args).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def adam(net, grads, moments, t, lr):
    """One step of Adam (0.5, 0.999) with L2 5e-5, written out."""
    for i, (weight, grad) in enumerate(zip(net.parameters(), grads, strict=True)):
        grad = grad + 5e-5 * weight.detach()
        m, v = moments.get(i, (0, 0))
        m, v = 0.5 * m + 0.5 * grad, 0.999 * v + 0.001 * grad**2
        moments[i] = m, v
        weight.data -= lr * (m / (1 - 0.5**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


@each_case
def test_all_three_are_updated_from_one_forward_pass(shape, flags, double, start):
    """The weights and the batch norms' statistics after three steps, worked out again."""
    run = start(bigan, shape, *flags, "--lr", 1e-3)
    nets, moments = copy.deepcopy(run.nets), {name: {} for name in run.nets}
    generator, encoder, discriminator = nets["generator"], nets["encoder"], nets["discriminator"]
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    for t in (1, 2, 3):
        for draws in run.draws.values():
            draws.clear()
        metrics = run.iteration()
        ((x, z),) = zip(run.draws["x"], run.draws["z"], strict=True)
        d_real, d_fake = discriminator(x, encoder(x)), discriminator(generator(z), z)
        ones, zeros = torch.ones_like(d_real), torch.zeros_like(d_real)
        swapped = cross_entropy(d_real, zeros) + cross_entropy(d_fake, ones)
        losses = {"generator": swapped, "encoder": swapped}
        losses["discriminator"] = cross_entropy(d_real, ones) + cross_entropy(d_fake, zeros)
        grads = {
            name: torch.autograd.grad(loss, [*nets[name].parameters()], retain_graph=True)
            for name, loss in losses.items()
        }
        for name, net in nets.items():
            adam(net, grads[name], moments[name], t, 1e-3)
            assert_close(net.state_dict(), run.nets[name].state_dict(), rtol=1e-7, atol=1e-10)
        assert_close(metrics["discriminator_loss"], losses["discriminator"].detach())
        assert_close(metrics["generator_encoder_loss"], swapped.detach())
        assert_close(metrics["D(x)"], d_real.detach().sigmoid().mean())
        assert_close(metrics["D(G(z))"], d_fake.detach().sigmoid().mean())
    for name, net in run.nets.items():
        moved = [(a - b).abs().max() for a, b in zip(net.parameters(), run.initial[name][0], strict=True)]
        assert max(moved) > 1e-3


@each_case
def test_each_network_is_run_once_for_each_half(shape, flags, start):
    run, calls = start(bigan, shape, *flags), []
    for name, net in run.nets.items():
        net.register_forward_hook(lambda *_, name=name: calls.append(name))
    run.iteration()
    assert sorted(calls) == ["discriminator", "discriminator", "encoder", "generator"]


# The networks


def test_the_papers_settings_for_mnist(configure):
    config = bigan.parse_args(["--dataset", "mnist", "--network", "mlp", "--device", "cpu"])
    assert (config.z_dim, config.batch_size, config.lr, 16 * config.width) == (50, 128, 2e-4, 1024)
    for name, net in bigan.networks(configure(bigan, GREY, "--network", "mlp", "--width", 3)).items():
        assert [layer.out_features for layer in of_kind(net, nn.Linear)][:2] == [16 * 3, 16 * 3], name


LETTERS = {nn.Linear: "F", nn.BatchNorm1d: "B", bigan.Squash: "S"}
IDLE = (nn.Flatten, nn.Unflatten, nn.Identity)


@pytest.mark.parametrize("shape", [GREY, POINTS], ids=["images", "points"])
def test_layers_of_the_mlps(shape, configure):
    """As in the paper: E has batch norm in its second layer only, so has D, G in both; points have none."""
    expected = {"generator": "FBRFBRFS", "encoder": "FLFBLFS", "discriminator": "FLFBLF"}
    for name, net in bigan.networks(configure(bigan, shape, "--network", "mlp")).items():
        spelled = ""
        for layer in net.modules():
            if isinstance(layer, nn.LeakyReLU):
                spelled += {0: "R", 0.2: "L"}[layer.negative_slope]
            elif not list(layer.children()) and not isinstance(layer, IDLE):
                spelled += LETTERS[type(layer)]
        wanted = expected[name] if shape == GREY else expected[name].replace("B", "")
        assert spelled == (wanted[:-1] if shape == POINTS and name == "generator" else wanted)


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_z_is_an_added_linear_term_of_the_second_layer(name, configure):
    """What goes into the second batch norm is affine in z for a given output of the first layer."""
    config = configure(bigan, GREY, "--network", "mlp")
    net = bigan.networks(config)[name].double().eval()
    first, second, _ = of_kind(net, nn.Linear)
    seen = {}

    def same_first(module, inputs, output):
        return seen.setdefault("first", output)

    first.register_forward_hook(same_first)  # whatever z is
    second.register_forward_hook(lambda *call: seen.update(second=call[2]))
    x, z = torch.rand(4, *GREY).double(), torch.rand(2, 4, 5).double()

    def sums(z):
        net(*((x, z) if name == "discriminator" else (z,)))
        return seen["second"]

    a, b, both, none = map(sums, (z[0], z[1], z[0] + z[1], 0 * z[0]))
    assert_close(a + b, both + none)
    assert (a - b).abs().min() > 0


def test_the_first_layers_see_z_in_g_and_x_alone_in_d(configure):
    nets = bigan.networks(configure(bigan, GREY, "--network", "mlp"))
    widths = {name: [layer.in_features for layer in of_kind(net, nn.Linear)] for name, net in nets.items()}
    units = 16 * 4
    assert widths["generator"] == [5, units + 5, units]
    assert widths["discriminator"] == [64, units + 5, units]


def test_a_pixel_that_is_always_black_moves_no_weight_of_the_discriminator(configure):
    """Pictures are in [0, 1] where the discriminator weighs them, so that black is nothing."""
    config = configure(bigan, GREY, "--network", "mlp")
    discriminator = bigan.networks(config)["discriminator"]
    x = 2 * torch.rand(6, *GREY) - 1
    x[:, :, 0] = -1
    discriminator(x, bigan.draw_z(6, config, "cpu")).square().sum().backward()
    grad = of_kind(discriminator, nn.Linear)[0].weight.grad.view(-1, *GREY)
    assert (grad[:, :, 0] == 0).all() and (grad[:, :, 1:].abs().amax(0) > 0).all()


@each_case
def test_codes_have_the_priors_range(shape, flags, configure):
    nets = bigan.networks(configure(bigan, shape, *flags))
    for net in nets.values():
        net.eval()
    x = torch.rand(20, *shape) * 2 - 1
    last = of_kind(nets["encoder"], nn.Linear)[-1]
    last.weight.data *= 1000
    z_hat = bigan.encode(nets, x)
    assert z_hat.abs().max() <= 1 and z_hat.min() < -0.9 and z_hat.max() > 0.9
    assert_close(z_hat, 2 * last(bigan.features(nets, x)).sigmoid() - 1)


def test_initial_weights_of_the_conv_networks(configure):
    """N(0, 0.02) in every matrix and kernel; biases and the norms' gains are PyTorch's."""
    nets = bigan.networks(configure(bigan, [1, 32, 32], "--width", 16))
    for net in nets.values():
        for layer in of_kind(net, nn.Linear, nn.Conv2d, nn.ConvTranspose2d):
            n = layer.weight.numel()
            assert layer.weight.mean().abs() < 0.02 * 5 / n**0.5
            assert abs(layer.weight.std() / 0.02 - 1) < 5 / n**0.5
            assert layer.bias is None or layer.bias.abs().max() > 0
        assert all((layer.weight == 1).all() for layer in of_kind(net, nn.BatchNorm2d))


# Learning


def test_it_learns_a_uniform_square_in_both_directions(configure):
    """Samples like the data, and G(E(x)) near x, though no term asks for it."""
    middle, size = torch.tensor([0.5, -0.5]), torch.tensor([1.0, 0.4])
    x = middle + size * (2 * torch.rand(2000, 2) - 1)
    config = configure(bigan, POINTS, "--z-dim", 2, "--batch-size", 128, "--width", 4, "--lr", 1e-3)
    nets, optimizers, iteration, _ = bigan.build(config, (x, None), (x, None))
    config.decay_start, config.decay_end = 700, 1000
    for step in range(1, 1001):
        bigan.set_rate(optimizers, config, step)
        iteration()
    with torch.no_grad():
        x_fake = bigan.generate(nets, bigan.draw_z(2000, config, "cpu"))
        x_rec = bigan.generate(nets, bigan.encode(nets, x))
    assert_close(x_fake.mean(0), x.mean(0), atol=0.3, rtol=0)
    assert_close(x_fake.std(0), x.std(0), atol=0.35, rtol=0)
    error, of_chance = (x_rec - x).norm(dim=1).mean(), (x_rec - x.roll(1, 0)).norm(dim=1).mean()
    assert error < 0.75 * of_chance
