"""The networks of every model file: shapes, ranges, the papers' rules, batch norm, the prior.

A new file joins by its name in the tables.
"""

import re
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.testing import assert_close

NETWORKS = {
    "dcgan": ["generator", "discriminator"],
    "wgan": ["generator", "critic"],
    "wgan_gp": ["generator", "critic"],
    "bigan": ["generator", "encoder", "discriminator"],
    "wbli": ["generator", "encoder", "critic"],
    "gm_wae": ["generator", "encoder", "classifier"],
}
ALIKE = ["dcgan", "wgan", "wgan_gp", "bigan", "wbli"]  # --network says of what kind all networks are
JOINT = ["bigan", "wbli"]  # the critic or discriminator takes x and z
ENCODERS = [name for name in ALIKE if "encoder" in NETWORKS[name]]
PENALISED = ["wgan_gp", "wbli"]  # the critic is under a gradient penalty
MIXED = {
    "dcgan": "discriminator",
    "wgan": "critic",
    "wgan_gp": "critic",
}  # takes --generator, and a flag of this name
PLAIN_MLP = ["dcgan", "wgan", "wgan_gp"]  # no batch norm in the fully connected generator
DCGAN_INIT = ["dcgan", "wgan", "wgan_gp"]  # N(0, 0.02)

KINDS = [
    *(([c, size, size], network) for c in (1, 3) for size in (32, 64) for network in ("conv", "mlp")),
    ([2], "mlp"),
]
RULES = {  # T transposed, C convolution, B batch norm, R ReLU, L LeakyReLU, H tanh, F fully connected
    "generator": "T(BRT)+H",
    "generator plain": "T(RT)+H",
    "encoder": "CL(CB?L)+F",
    "dcgan discriminator": "CL(CBL)+C",
    "wgan critic": "CL(CBL)+C",
    "wgan_gp critic": "CL(CL)+C",
    "bigan encoder": "CL(CBL)+FS",
    "bigan discriminator": "CL(CBL)+F[LF]+",
    "wbli critic": "CL(CL)+F[LF]+",
}
LETTERS = {nn.ConvTranspose2d: "T", nn.Conv2d: "C", nn.BatchNorm2d: "B", nn.ReLU: "R", nn.Tanh: "H"}
LETTERS |= {nn.LeakyReLU: "L", nn.Linear: "F", nn.Identity: "", nn.Flatten: "", nn.Unflatten: ""}
LETTERS |= {import_module("bigan").Squash: "S"}


def each(models):
    return pytest.mark.parametrize("model", models, indirect=True)


each_kind = pytest.mark.parametrize("shape, network", KINDS, ids=lambda kind: str(kind).replace(" ", ""))


@pytest.fixture
def build(configure):
    """build(model, shape, *flags) → nets, config, n draws of x and z; float64, used, in eval mode."""

    def build(model, shape, *flags, n=3):
        config = configure(model, shape, *flags)
        nets = {name: net.double() for name, net in model.networks(config).items()}
        x, z = torch.rand(n, *shape).double() * 2 - 1, model.draw_z(n, config, "cpu").double()
        with torch.no_grad():
            for _ in range(3):  # statistics that are neither 0 and 1 nor this batch's
                many = torch.rand(20, *shape).double(), torch.randn(20, config.z_dim).double() + 0.5
                model.generate(nets, many[1])
                score(model, nets, *many)
                if "encoder" in nets:
                    model.encode(nets, many[0])
        for net in nets.values():
            net.eval()
        return nets, config, x, z

    return build


def score(model, nets, x, z):
    """A number for each x: F or D, or the largest logit of q(k|x)."""
    if "classifier" in nets:
        return nets["classifier"](x).amax(1)
    critic = nets.get("critic") or nets["discriminator"]
    return critic(x, z) if model.__name__ in JOINT else critic(x)


def leaves(net):
    return [module for module in net.modules() if not list(module.children())]


def of_kind(net, *kinds):
    return [module for module in net.modules() if isinstance(module, kinds)]


def spelled(net):
    """The net's layers in order, a letter each; a kind that has no letter is an error."""
    return "".join(LETTERS[type(module)] for module in leaves(net))


# Shapes and ranges


@each(NETWORKS)
@each_kind
def test_names_and_shapes(model, shape, network, build):
    for n in (3, 1):
        nets, config, x, z = build(model, shape, "--network", network, n=n)
        assert list(nets) == NETWORKS[model.__name__]
        assert model.generate(nets, z).shape == (n, *shape)
        assert score(model, nets, x, z).shape == (n,)
        if "encoder" in nets:
            assert model.encode(nets, x).shape == (n, config.z_dim)
            assert model.features(nets, x).ndim == 2 and len(model.features(nets, x)) == n


@each(NETWORKS)
@each_kind
def test_range(model, shape, network, build):
    """Images are in [−1, 1] and reach both ends, codes where the prior does; nothing else has bounds."""
    nets, config, x, z = build(model, shape, "--network", network)
    for net in nets.values():
        for weight in net.parameters():
            weight.data *= 30
    x_fake = model.generate(nets, z)
    if len(shape) == 3:
        assert x_fake.min() < -0.99 and x_fake.max() > 0.99
        assert x_fake.min() >= -1 and x_fake.max() <= 1
    else:
        assert x_fake.abs().max() > 2
    assert score(model, nets, x, z).abs().max() > 2
    if "encoder" in nets:
        assert (model.encode(nets, x).abs().max() > 2) == (config.prior != "uniform")


@each(ALIKE)
@each_kind
def test_width(model, shape, network, configure):
    nets = model.networks(configure(model, shape, "--network", network, "--width", 3))
    generator, score_net = nets["generator"], nets.get("critic") or nets["discriminator"]
    if network == "conv":
        assert of_kind(generator, nn.ConvTranspose2d)[-1].in_channels == 3
        assert of_kind(score_net, nn.Conv2d)[0].out_channels == 3
        assert "encoder" not in nets or of_kind(nets["encoder"], nn.Conv2d)[0].out_channels == 3
    else:
        for net in nets.values():
            assert of_kind(net, nn.Linear)[0].out_features == 8 * 3
            assert of_kind(net, nn.Linear)[-1].in_features == 8 * 3


@each(ENCODERS)
@each_kind
def test_features_are_what_the_encoders_last_layer_reads(model, shape, network, build):
    nets, _, x, _ = build(model, shape, "--network", network)
    last = [module for module in leaves(nets["encoder"]) if list(module.parameters())][-1]
    read = []
    last.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    z_hat = model.encode(nets, x)
    features = model.features(nets, x)
    assert_close(features, read[0].flatten(1))
    assert features.shape[1] != z_hat.shape[1]
    if last is leaves(nets["encoder"])[-1]:
        assert_close(last(features), z_hat)


@each(NETWORKS)
@pytest.mark.parametrize("size", [8, 16, 128])
def test_sizes_of_a_conv_net(model, size, build):
    nets, _, x, z = build(model, [1, size, size])
    assert model.generate(nets, z).shape == x.shape
    assert score(model, nets, x, z).shape == (3,)
    assert "encoder" not in nets or model.encode(nets, x).shape == z.shape


@each(NETWORKS)
@pytest.mark.parametrize("size", [4, 28, 30, 33])
def test_sizes_that_only_an_mlp_takes(model, size, build, configure):
    with pytest.raises(ValueError, match=f"not {size};") as error:
        model.networks(configure(model, [3, size, size]))
    assert "\n" not in str(error.value)
    nets, _, x, z = build(model, [3, size, size], "--network", "mlp")
    assert model.generate(nets, z).shape == x.shape
    assert score(model, nets, x, z).shape == (3,)


@each(NETWORKS)
def test_a_conv_net_takes_no_points(model, configure):
    config = configure(model, [2], "--network", "conv")
    with pytest.raises(ValueError, match="conv"):
        model.networks(config)


# Which network is which


@each(MIXED)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("critic", ["conv", "mlp"])
@pytest.mark.parametrize("generator", ["conv", "conv-plain", "mlp"])
@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_mixed_networks(model, network, generator, critic, channels, build):
    other = MIXED[model.__name__]
    flags = ["--network", network, "--generator", generator, f"--{other}", critic]
    nets, _, x, z = build(model, [channels, 16, 16], *flags)
    spelling = spelled(nets["generator"])
    assert re.fullmatch(RULES["generator" + " plain" * (generator == "conv-plain")], spelling) or (
        generator == "mlp" and re.fullmatch("(FB?[LR])+FH", spelling)
    )
    assert spelled(nets[other])[0] == {"conv": "C", "mlp": "F"}[critic]
    x_fake = model.generate(nets, z)
    assert x_fake.shape == x.shape and score(model, nets, x_fake, z).shape == (3,)
    score(model, nets, x_fake, z).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in nets["generator"].parameters())


@each(MIXED)
def test_one_conv_net_limits_the_size(model, configure):
    other = "--" + MIXED[model.__name__]
    model.networks(configure(model, [1, 28, 28], "--generator", "mlp", other, "mlp"))
    for flags in (["--generator", "mlp"], [other, "mlp"], ["--network", "mlp", other, "conv"]):
        with pytest.raises(ValueError, match="28"):
            model.networks(configure(model, [1, 28, 28], *flags))


# The papers' rules


@each(ALIKE)
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_rules_of_dcgan(model, channels, size, configure):
    """Strides and no pooling; ReLU and tanh in G, LeakyReLU 0.2 elsewhere; where batch norm is."""
    nets = model.networks(configure(model, [channels, size, size]))
    for name, net in nets.items():
        rule = RULES.get(f"{model.__name__} {name}") or RULES[name]
        assert re.fullmatch(rule, spelled(net)), f"{name}: {spelled(net)}"
        convolutions = of_kind(net, nn.Conv2d, nn.ConvTranspose2d)
        strided = [layer for layer in convolutions if layer.stride == (2, 2)]
        assert 2 ** len(strided) == size / 4
        from_one_pixel = 1 if name == "generator" or spelled(net)[-1] == "C" else 0  # or to one pixel
        assert len(convolutions) == len(strided) + from_one_pixel
        assert all(layer.dilation == (1, 1) and layer.groups == 1 for layer in convolutions)
        assert all(layer.negative_slope == 0.2 for layer in of_kind(net, nn.LeakyReLU))


@each(MIXED)
def test_plain_generator(model, configure):
    config = configure(model, [3, 64, 64], "--generator", "conv-plain", "--width", 7)
    generator = model.networks(config)["generator"]
    assert re.fullmatch(RULES["generator plain"], spelled(generator))
    assert [layer.out_channels for layer in of_kind(generator, nn.ConvTranspose2d)] == [7, 7, 7, 7, 3]


@each([name for name in ALIKE if name != "bigan"])  # whose paper has other mlps: test_bigan.py
@pytest.mark.parametrize("shape", [[1, 32, 32], [2]], ids=str)
def test_mlp(model, shape, configure):
    """ReLU and batch norm in generators, LeakyReLU 0.2 without norm in all others; no norm for points."""
    nets = model.networks(configure(model, shape, "--network", "mlp"))
    for name, net in nets.items():
        slopes = {layer.negative_slope for layer in of_kind(net, nn.LeakyReLU)}
        if name == "generator":
            assert slopes <= {0} and (slopes or of_kind(net, nn.ReLU))
        else:
            assert slopes == {0.2} and not of_kind(net, nn.ReLU)
        norms = len(of_kind(net, nn.BatchNorm1d))
        if len(shape) == 1 or name != "generator" or model.__name__ in PLAIN_MLP:
            assert norms == 0
        else:
            assert norms == len(of_kind(net, nn.Linear)) - 1


@each(DCGAN_INIT)
def test_initial_weights_of_the_conv_generator(model, configure):
    generator = model.networks(configure(model, [3, 32, 32], "--width", 32, "--z-dim", 50))["generator"]
    for layer in of_kind(generator, nn.ConvTranspose2d):
        error = 4 / layer.weight.numel() ** 0.5
        assert_close(layer.weight.std().item(), 0.02, rtol=error, atol=0)
        assert_close(layer.weight.mean().item(), 0.0, atol=0.02 * error, rtol=0)
    norms = of_kind(generator, nn.BatchNorm2d)
    gains = torch.cat([norm.weight for norm in norms])
    assert_close(gains.mean().item(), 1.0, atol=0.01, rtol=0)
    assert_close(gains.std().item(), 0.02, atol=0.005, rtol=0)
    assert all((norm.bias == 0).all() for norm in norms)


# Batch norm


@each(NETWORKS)
@each_kind
def test_batch_norm_arguments(model, shape, network, configure):
    """`BatchNorm2d(c, 0.8)` sets eps; here it is small, and the momentum PyTorch's."""
    nets = model.networks(configure(model, shape, "--network", network))
    norms = of_kind(nn.ModuleDict(nets), nn.modules.batchnorm._NormBase)
    assert norms or network == "mlp"
    for norm in norms:
        assert norm.eps <= 1e-3 and norm.momentum == 0.1 and norm.track_running_stats
        assert norm.affine != (model.__name__ == "bigan" and network == "mlp")


def influence(model, nets, x, z):
    """In train mode the norms of ∂F(x₀, z₀)/∂x_j and, if the critic takes z, ∂F(x₀, z₀)/∂z_j."""
    inputs = [x.requires_grad_()] + [z.requires_grad_()] * (model.__name__ in JOINT)
    for net in nets.values():
        net.train()
    gradients = torch.autograd.grad(score(model, nets, x, z)[0], inputs)
    return [part.flatten(1).norm(dim=1) for part in gradients]


@each(PENALISED)
@each_kind
def test_critic_under_a_penalty_takes_each_sample_by_itself(model, shape, network, build):
    nets, _, x, z = build(model, shape, "--network", network, n=5)
    for part in influence(model, nets, x, z):
        assert part[0] > 0
        assert (part[1:] == 0).all()


@each(["wgan"])
def test_wgans_conv_critic_keeps_batch_norm(model, build):
    nets, _, x, z = build(model, [3, 32, 32], n=5)
    (part,) = influence(model, nets, x, z)
    assert (part > 0).all()


@each(NETWORKS)
@each_kind
def test_a_sample_does_not_depend_on_its_neighbours(model, shape, network, build):
    """In eval mode, as pictures are drawn."""
    nets, _, x, z = build(model, shape, "--network", network, n=4)
    functions = {
        "generate": lambda i: model.generate(nets, z[i]),
        "score": lambda i: score(model, nets, x[i], z[i]),
        "encode": lambda i: model.encode(nets, x[i]) if "encoder" in nets else x[i],
    }
    for function in functions.values():
        together = function(slice(None))
        alone = torch.cat([function(slice(i, i + 1)) for i in range(4)])
        assert_close(alone, together, atol=1e-12, rtol=1e-9)
        assert (together[0] != together[1]).any()


# Random numbers


@each(ALIKE)
def test_prior(model, configure):
    config = configure(model, [1, 32, 32], "--z-dim", 7)
    n = 40_000
    z = model.draw_z(n, config, torch.device("cpu"))
    assert z.shape == (n, 7) and z.dtype == torch.float32
    moments = {"normal": (0, 1, 0, 3), "uniform": (0, 1 / 3, 0, 1 / 5)}[config.prior]
    for power, expected in enumerate(moments, start=1):
        powers = z.double() ** power
        five_errors = 5 * powers.std().item() / n**0.5
        expected = torch.full((7,), expected, dtype=torch.float64)
        assert_close(powers.mean(0), expected, atol=five_errors, rtol=0)
    correlations = torch.corrcoef(z.T) - torch.eye(7)
    assert_close(correlations, torch.zeros(7, 7), atol=5 / n**0.5, rtol=0)
    if config.prior == "uniform":
        assert z.abs().max() <= 1


@each(NETWORKS)
def test_prior_uses_the_device_and_the_default_generator(model, configure):
    config = configure(model, [1, 32, 32])
    assert model.draw_z(2, config, torch.device("meta")).device.type == "meta"
    torch.manual_seed(4)
    first, second = (model.draw_z(3, config, "cpu") for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(model.draw_z(3, config, "cpu"), first)


@each(NETWORKS)
@each_kind
def test_the_seed_fixes_the_networks(model, shape, network, configure):
    config = configure(model, shape, "--network", network)

    def weights(seed):
        torch.manual_seed(seed)
        return nn.ModuleDict(model.networks(config)).state_dict()

    first, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
