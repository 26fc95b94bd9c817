"""The networks of every file: shapes, ranges, the papers' rules, batch norm and biases, the prior.

What all files share to the letter is tested in one of them.
"""

import re
from itertools import pairwise

import pytest
import torch
from conftest import MODELS, having
from torch import nn
from torch.testing import assert_close

import bigan
import dcgan
import wbli

CRITIC = {  # the network that scores x, or x and z, with a number
    "dcgan": "discriminator",
    "wgan": "critic",
    "wgan_gp": "critic",
    "bigan": "discriminator",
    "wbli": "critic",
    "alpha_gan": "discriminator",
}
JOINT = ["bigan", "wbli"]  # it takes x and z
MIXED = ["dcgan", "wgan", "wgan_gp"]  # --generator, and a flag of its name
DCGAN_INIT = [*MIXED, "alpha_gan"]
PLAIN_MLP = MIXED  # no batch norm in the fully connected generator
PENALISED = ["wgan_gp", "wbli"]  # under a gradient penalty

CONV, MLP, POINTS = ([3, 16, 16], "conv"), ([1, 7, 7], "mlp"), ([2], "mlp")
RULES = {  # T transposed, C convolution, B batch norm, R ReLU, L LeakyReLU, H tanh, F fully connected
    "generator": "T(BRT)+H",
    "dcgan discriminator": "CL(CBL)+C",
    "wgan critic": "CL(CBL)+C",
    "wgan_gp critic": "CL(CL)+C",
    "bigan encoder": "CL(CBL)+FS",
    "bigan discriminator": "CL(CBL)+F[LF]+",
    "wbli encoder": "CL(CL)+F",
    "wbli critic": "CL(CL)+F[LF]+",
    "gm_wae classifier": "CL(CBL)+F",
    "gm_wae encoder": "(FBRF)+",
    "alpha_gan encoder": "CL(CBL)+F",
    "alpha_gan discriminator": "CL(CBL)+C",
    "alpha_gan code_discriminator": "(FL)+F",
}
LETTERS = {
    nn.ConvTranspose2d: "T",
    nn.Conv2d: "C",
    nn.Linear: "F",
    nn.BatchNorm1d: "B",
    nn.BatchNorm2d: "B",
    nn.ReLU: "R",
    nn.Tanh: "H",
    bigan.Squash: "S",
}


def each(models):
    return pytest.mark.parametrize("model", models, indirect=True)


each_kind = pytest.mark.parametrize("shape, network", [CONV, MLP, POINTS], ids=["conv", "mlp", "points"])


def leaves(net):
    """The net's layers in order, but for what only changes a shape."""
    idle = (nn.Identity, nn.Flatten, nn.Unflatten)
    return [part for part in net.modules() if not list(part.children()) and not isinstance(part, idle)]


def of_kind(net, *kinds):
    return [module for module in net.modules() if isinstance(module, kinds)]


def spelled(net):
    """The net's layers, a letter each; a kind that has no letter is an error."""
    kinds = [(type(layer), getattr(layer, "negative_slope", None)) for layer in leaves(net)]
    assert {slope for _, slope in kinds} <= {None, 0, 0.2}
    return "".join({0: "R", 0.2: "L"}.get(slope) or LETTERS[kind] for kind, slope in kinds)


def score(model, nets, x, z):
    critic = nets[CRITIC[model.__name__]]
    return critic(x, z) if model.__name__ in JOINT else critic(x)


@pytest.fixture
def made(configure):
    """made(model, shape, *flags, n=3) → nets in float64, config, n draws of x and z."""

    def made(model, shape, *flags, n=3):
        config = configure(model, shape, *flags)
        nets = nn.ModuleDict(model.networks(config)).double()
        return nets, config, torch.rand(n, *shape).double() * 2 - 1, model.draw_z(n, config, "cpu").double()

    return made


def used(nets):
    """In eval mode, with statistics that are neither 0 and 1 nor those of any batch."""
    for norm in of_kind(nets, nn.modules.batchnorm._NormBase):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
    return nets.eval()


# What every file promises


@each(MODELS)
@each_kind
def test_shapes(model, shape, network, made):
    """A batch of one keeps its shape, too."""
    nets, config, *_ = made(model, shape, "--network", network)
    used(nets)
    for n in (3, 1):
        x, z = torch.rand(n, *shape).double(), model.draw_z(n, config, "cpu").double()
        assert z.ndim == 2 and len(z) == n
        assert model.generate(nets, z).shape == x.shape
        if model.__name__ in CRITIC:
            assert score(model, nets, x, z).shape == (n,)
        if hasattr(model, "encode"):
            assert model.encode(nets, x).shape == (n, config.z_dim)
        if hasattr(model, "features"):
            assert model.features(nets, x).ndim == 2 and len(model.features(nets, x)) == n
        if hasattr(model, "classify"):
            p = model.classify(nets, x)
            assert p.ndim == 2 and (p >= 0).all()
            assert_close(p.sum(1), torch.ones(n).double())
    assert ("encoder" in nets) == hasattr(model, "encode")


@each(MODELS)
@each_kind
def test_range(model, shape, network, made):
    """Images are in [−1, 1] and reach both ends; points have no bounds."""
    nets, _, _, z = made(model, shape, "--network", network, n=9)
    for weight in used(nets)["generator"].parameters():
        weight.data *= 30
    x_fake = model.generate(nets, z)
    if len(shape) == 3:
        assert x_fake.min() < -0.99 and x_fake.max() > 0.99
        assert x_fake.min() >= -1 and x_fake.max() <= 1
    else:
        assert x_fake.abs().max() > 2


@each(MODELS)
@each_kind
def test_batch_norm_and_biases(model, shape, network, configure):
    """`BatchNorm2d(c, 0.8)` sets eps: here it is small, the momentum PyTorch's.

    A layer that batch norm follows has no bias, as the norm has one or the next layer does; all others do.
    """
    nets = model.networks(configure(model, shape, "--network", network))
    for norm in of_kind(nn.ModuleDict(nets), nn.modules.batchnorm._NormBase):
        assert norm.eps <= 1e-3 and norm.momentum == 0.1 and norm.track_running_stats
        assert norm.affine != (model is bigan and network == "mlp")
    seen = 0
    for net in nets.values():
        for layer, following in pairwise([*leaves(net), None]):
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                normed = isinstance(following, nn.modules.batchnorm._NormBase)
                plain = net is nets["generator"] and network == "conv"  # its last layer has none, either
                assert (layer.bias is None) == (normed or plain), layer
                seen += 1
    assert seen > 2


@each(MODELS)
@each_kind
def test_a_sample_does_not_depend_on_its_neighbours(model, shape, network, made):
    """In eval mode, as pictures are drawn."""
    nets, _, x, z = made(model, shape, "--network", network, n=4)
    used(nets)
    functions = {"generate": z, "encode": x, "features": x, "classify": x}
    for name, batch in functions.items():
        if hasattr(model, name):
            together = getattr(model, name)(nets, batch)
            alone = torch.cat([getattr(model, name)(nets, batch[i : i + 1]) for i in range(4)])
            assert_close(alone, together, atol=1e-12, rtol=1e-9)
            assert (together[0] != together[1]).any()


@each(MODELS)
def test_the_prior_uses_the_device_and_the_default_generator(model, configure):
    config = configure(model, [1, 32, 32])
    assert model.draw_z(2, config, torch.device("meta")).device.type == "meta"
    torch.manual_seed(4)
    first, second = (model.draw_z(3, config, "cpu") for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(model.draw_z(3, config, "cpu"), first)


@each(CRITIC)
def test_prior(model, configure):
    config = configure(model, [1, 32, 32], "--z-dim", 7)
    n = 40_000
    z = model.draw_z(n, config, torch.device("cpu"))
    assert z.shape == (n, 7) and z.dtype == torch.float32
    moments = (0, 1 / 3, 0, 1 / 5) if model is bigan else (0, 1, 0, 3)  # of U(−1, 1), of N(0, 1)
    for power, expected in enumerate(moments, start=1):
        powers = z.double() ** power
        five_errors = 5 * powers.std().item() / n**0.5
        expected = torch.full((7,), expected, dtype=torch.float64)
        assert_close(powers.mean(0), expected, atol=five_errors, rtol=0)
    correlations = torch.corrcoef(z.T) - torch.eye(7)
    assert_close(correlations, torch.zeros(7, 7), atol=5 / n**0.5, rtol=0)
    if model is bigan:
        assert z.abs().max() <= 1


@each([name for name in having("features") if name in CRITIC])
@each_kind
def test_features_are_what_the_encoders_last_layer_reads(model, shape, network, made):
    nets, _, x, _ = made(model, shape, "--network", network)
    last = of_kind(used(nets)["encoder"], nn.Linear)[-1]
    read = []
    last.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    z_hat = model.encode(nets, x)
    assert_close(model.features(nets, x), read[0])
    assert read[0].shape[1] != z_hat.shape[1]
    if last is leaves(nets["encoder"])[-1]:
        assert_close(last(read[0]), z_hat)


# The papers' rules


def test_widths_of_a_conv_net():
    """Those of dcgan.py: the function is the same in all files."""
    assert dcgan.conv_widths([1, 8, 8], 4) == [4]
    assert dcgan.conv_widths([3, 64, 64], 4) == [4, 8, 16, 32]
    assert dcgan.conv_widths([3, 64, 64], 7, growth=1) == [7, 7, 7, 7]
    for size in (4, 28, 30, 33):
        with pytest.raises(ValueError, match=f"--image-size {size}:") as error:
            dcgan.conv_widths([3, size, size], 4)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--network mlp"):
        dcgan.conv_widths([2], 4)


@each([*CRITIC, "gm_wae"])
@pytest.mark.parametrize("size", [32, 64])
def test_rules_of_dcgan(model, size, configure):
    """Strides and no pooling; ReLU and tanh in G, LeakyReLU 0.2 elsewhere; where batch norm is."""
    nets = model.networks(configure(model, [3, size, size]))
    for name, net in nets.items():
        rule = RULES.get(f"{model.__name__} {name}") or RULES[name]
        assert re.fullmatch(rule, spelled(net)), f"{name}: {spelled(net)}"
        convolutions = of_kind(net, nn.Conv2d, nn.ConvTranspose2d)
        if not convolutions:
            continue
        strided = [layer for layer in convolutions if layer.stride == (2, 2)]
        assert 2 ** len(strided) == size / 4
        from_one_pixel = 1 if name == "generator" or spelled(net)[-1] == "C" else 0  # or to one pixel
        assert len(convolutions) == len(strided) + from_one_pixel
        assert all(layer.dilation == (1, 1) and layer.groups == 1 for layer in convolutions)
        next_to_x = convolutions[-1].in_channels if name == "generator" else convolutions[0].out_channels
        assert next_to_x == 4  # --width


@each([name for name in CRITIC if name != "bigan"])  # whose paper has other mlps: test_bigan.py
@pytest.mark.parametrize("shape", [[1, 7, 7], [2]], ids=str)
def test_rules_of_mlps(model, shape, configure):
    """ReLU and batch norm in generators, LeakyReLU 0.2 without norm in all others; no norm for points."""
    nets = model.networks(configure(model, shape, "--network", "mlp", "--width", 3))
    for name, net in nets.items():
        linear = of_kind(net, nn.Linear)
        assert {layer.out_features for layer in linear[:-1]} == {8 * 3}
        if name != "generator":
            rule = "(FL?)+F"  # a joint critic's towers end without
        elif len(shape) == 1:
            rule = "(FR)+F"
        else:
            rule = "(FR)+FH" if model.__name__ in PLAIN_MLP else "(FBR)+FH"
        assert re.fullmatch(rule, spelled(net)), f"{name}: {spelled(net)}"


@each(MIXED)
@pytest.mark.parametrize("critic", ["conv", "mlp"])
@pytest.mark.parametrize("generator", ["conv", "conv-plain", "mlp"])
def test_mixed_networks(model, generator, critic, made):
    """Each flag alone decides; only a conv net limits the size."""
    other = CRITIC[model.__name__]
    flags = ["--generator", generator, f"--{other}", critic]
    for network in ("conv", "mlp"):
        nets, _, x, z = made(model, [3, 16, 16], "--network", network, *flags)
        rule = {"conv": "T(BRT)+H", "conv-plain": "T(RT)+H", "mlp": "(FR)+FH"}[generator]
        assert re.fullmatch(rule, spelled(nets["generator"]))
        assert spelled(nets[other])[0] == {"conv": "C", "mlp": "F"}[critic]
        score(model, nets, model.generate(nets, z), z).sum().backward()
        assert all(weight.grad.isfinite().all() for weight in nets["generator"].parameters())
    if generator == critic == "mlp":
        made(model, [3, 28, 28], *flags)
    else:
        with pytest.raises(ValueError, match="28"):
            made(model, [3, 28, 28], *flags)


def test_plain_generator(configure):
    """The WGAN paper's: as many filters everywhere, and biases in the place of batch norm."""
    config = configure(dcgan, [3, 64, 64], "--generator", "conv-plain", "--width", 7)
    layers = of_kind(dcgan.networks(config)["generator"], nn.ConvTranspose2d)
    assert [layer.out_channels for layer in layers] == [7, 7, 7, 7, 3]
    assert all(layer.bias is not None for layer in layers)


@each(DCGAN_INIT)
def test_initial_weights_of_conv_nets(model, configure):
    nets = model.networks(configure(model, [3, 32, 32], "--width", 32, "--z-dim", 50))
    for name in ("generator", CRITIC[model.__name__]):
        for layer in of_kind(nets[name], nn.ConvTranspose2d, nn.Conv2d):
            error = 5 / layer.weight.numel() ** 0.5
            assert_close(layer.weight.std().item(), 0.02, rtol=error, atol=0)
            assert_close(layer.weight.mean().item(), 0.0, atol=0.02 * error, rtol=0)
        norms = of_kind(nets[name], nn.BatchNorm2d)
        if norms:
            gains = torch.cat([norm.weight for norm in norms])
            assert_close(gains.mean().item(), 1.0, atol=0.01, rtol=0)
            assert_close(gains.std().item(), 0.02, atol=0.005, rtol=0)
            assert all((norm.bias == 0).all() for norm in norms)


# Critics


def influence(model, nets, x, z):
    """In train mode the norms of ∂F(x₀, z₀)/∂x_j and, if the critic takes z, ∂F(x₀, z₀)/∂z_j."""
    inputs = [x.requires_grad_()] + [z.requires_grad_()] * (model.__name__ in JOINT)
    gradients = torch.autograd.grad(score(model, nets.train(), x, z)[0], inputs)
    return [part.flatten(1).norm(dim=1) for part in gradients]


@each(PENALISED)
@each_kind
def test_critic_under_a_penalty_takes_each_sample_by_itself(model, shape, network, made):
    """So that real and fake may share a call: together they score as in two calls."""
    nets, _, x, z = made(model, shape, "--network", network, n=4)
    for part in influence(model, nets, x, z):
        assert part[0] > 0
        assert (part[1:] == 0).all()
    halves = [score(model, nets, x[i : i + 2], z[i : i + 2]) for i in (0, 2)]
    assert_close(score(model, nets, x, z), torch.cat(halves))


@each(["wgan"])
def test_wgans_conv_critic_keeps_batch_norm(model, made):
    nets, _, x, z = made(model, [3, 16, 16], n=4)
    (part,) = influence(model, nets, x, z)
    assert (part > 0).all()


@pytest.mark.parametrize("constraint, parts", [("gp", 3), ("clip", 2)])
def test_wblis_critic_has_a_product_of_towers_unless_clipped(constraint, parts, made):
    """The product's slope in x grows with z, which no clipping of weights bounds."""
    for shape in ([1, 8, 8], [2]):
        nets, _, x, z = made(wbli, shape, "--constraint", constraint)
        critic, read = nets["critic"], []
        critic.head.register_forward_pre_hook(lambda _, inputs, read=read: read.append(inputs[0]))
        critic(x, z)
        a, b = critic.x_tower(x), critic.z_tower(z)
        sides = [nn.functional.leaky_relu(side, 0.2) for side in (a, b)]
        assert_close(read[0], torch.cat([*sides, a * b][:parts], dim=1))
