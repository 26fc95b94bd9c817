"""AGE: the divergence in closed form, what each loss holds, who is moved by it and in which direction."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import age

POINTS, GREY, COLOUR = [2], [1, 8, 8], [3, 16, 16]
CASES = [(COLOUR, ()), (GREY, ("--network", "mlp")), (POINTS, ())]

each_case = pytest.mark.parametrize("shape, flags", CASES, ids=["conv", "mlp", "points"])


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


# The divergence


@pytest.mark.parametrize("n, d", [(2, 1), (7, 3), (64, 16)])
def test_kl_is_that_of_the_fitted_gaussian_from_the_prior(n, d):
    """KL(N(m, s²) ‖ N(0, 1)), not the reverse; s is a standard deviation, ÷ n; the mean over dimensions."""
    codes = 0.3 + normal(n, d) * torch.rand(d).double()
    fitted = Normal(codes.mean(0), (codes - codes.mean(0)).square().mean(0).sqrt())
    expected = kl_divergence(fitted, Normal(0.0, 1.0))
    assert_close(age.kl_to_prior(codes), expected.mean())


def test_kl_of_some_batches():
    """0 at mean 0 and variance 1; ½m² for a shift by m; not of each code by itself."""
    ones = torch.tensor([[1.0], [-1.0]]).double().expand(-1, 3)
    assert_close(age.kl_to_prior(ones).item(), 0.0)
    assert_close(age.kl_to_prior(ones + 2).item(), 2.0)
    assert_close(age.kl_to_prior(3 * ones).item(), (9 - math.log(9) - 1) / 2)


@pytest.mark.parametrize("d", [2, 16, 64])
def test_least_kl_on_the_sphere(d):
    """½(1/d + log d − 1): reached by ± the axes, approached by the prior, missed by a part of the sphere."""
    floor = (1 / d + math.log(d) - 1) / 2
    axes = torch.cat([torch.eye(d), -torch.eye(d)]).double()
    assert_close(age.kl_to_prior(axes).item(), floor)
    codes = torch.nn.functional.normalize(normal(20_000, d))
    assert_close(age.kl_to_prior(codes).item(), floor, atol=2e-3, rtol=0)
    assert age.kl_to_prior(codes.abs()) > floor + 0.1


# The losses


@pytest.mark.parametrize("weight", [0.5, 10])
def test_encoder_loss(weight):
    """Δ(E(x)) − Δ(E(G(z))) + μ E|x − G(E(x))|, a mean over pixels; it knows nothing of z."""
    x, x_rec = normal(6, 1, 4, 4), normal(6, 1, 4, 4).requires_grad_()
    z_hat, z_rec = normal(6, 3).requires_grad_(), normal(6, 3).requires_grad_()
    loss = age.encoder_loss(x, x_rec, z_hat, z_rec, weight)
    error = (x - x_rec).abs().sum() / (6 * 16)
    assert_close(loss, age.kl_to_prior(z_hat) - age.kl_to_prior(z_rec) + weight * error)
    by_rec, by_real, by_fake = gradients(loss, x_rec, z_hat, z_rec)
    assert_close(by_rec, weight * (x_rec - x).sign().detach() / (6 * 16))
    assert_close(by_real, *gradients(age.kl_to_prior(z_hat), z_hat))
    assert_close(by_fake, -gradients(age.kl_to_prior(z_rec), z_rec)[0])


@pytest.mark.parametrize("weight", [0.5, 500])
def test_generator_loss(weight):
    """Δ(E(G(z))) + λ E(z − E(G(z)))², a mean over dimensions; it knows nothing of pixels."""
    z, z_rec = normal(6, 3), normal(6, 3).requires_grad_()
    loss = age.generator_loss(z, z_rec, weight)
    assert_close(loss, age.kl_to_prior(z_rec) + weight * (z - z_rec).square().sum() / 18)
    (kl,) = gradients(age.kl_to_prior(z_rec), z_rec)
    assert_close(*gradients(loss, z_rec), kl + weight * 2 * (z_rec - z).detach() / 18)


def test_lambda_is_half_the_weight_of_a_product():
    """On the sphere λ of the mean square and 2λ of minus the mean product differ by a constant."""
    z, z_rec = (nn.functional.normalize(normal(9, 4)) for _ in range(2))
    square = age.generator_loss(z, z_rec, 500) - age.kl_to_prior(z_rec)
    assert_close(square, 1000 * (1 / 4 - (z * z_rec).mean()))


# The networks


def test_z_is_uniform_on_the_sphere(configure):
    config = configure(age, GREY)
    z = age.draw_z(20_000, config, "cpu")
    assert z.shape == (20_000, config.z_dim)
    assert_close(z.norm(dim=1), torch.ones(20_000))
    assert_close(z.mean(0), torch.zeros(config.z_dim), atol=0.02, rtol=0)
    assert_close(z.T @ z / 20_000, torch.eye(config.z_dim) / config.z_dim, atol=0.01, rtol=0)
    assert_close(z[:, 0].pow(4).mean().item(), 3 / 35, atol=5e-3, rtol=0)  # 3 / d(d + 2) on the sphere


@pytest.mark.parametrize("network", ["conv", "mlp"])
@pytest.mark.parametrize("shape", [[c, size, size] for c in (1, 3) for size in (32, 64)] + [[2]], ids=str)
def test_shapes(shape, network, configure):
    if shape == POINTS and network == "conv":
        pytest.skip("points take an mlp")
    config = configure(age, shape, "--network", network)
    nets = {name: net.eval() for name, net in age.networks(config).items()}
    assert list(nets) == ["generator", "encoder"]
    for n in (3, 1):  # a batch of one keeps its shape
        x, z = torch.randn(n, *shape), age.draw_z(n, config, "cpu")
        assert age.generate(nets, z).shape == x.shape
        codes = age.encode(nets, x)
        assert codes.shape == z.shape
        assert_close(codes.norm(dim=1), torch.ones(n))
        hidden = age.features(nets, x)
        assert hidden.ndim == 2 and len(hidden) == n
        last = list(nets["encoder"][0])[-1]
        assert_close(nn.functional.normalize(last(hidden)), codes)


def test_batch_norm(configure):
    """In both conv networks and in the generator's mlp; an encoder's mlp with it would learn nothing."""

    def norms(net):
        return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]

    found = {}
    for (shape, flags), kind in zip(CASES, ("conv", "mlp", "points"), strict=True):
        nets = age.networks(configure(age, shape, *flags))
        found[kind] = {name for name, net in nets.items() if norms(net)}
        for norm in norms(nn.ModuleDict(nets)):
            assert norm.eps <= 1e-3 and norm.momentum == 0.1
    assert found == {"conv": {"generator", "encoder"}, "mlp": {"generator"}, "points": set()}


def test_one_dimension_has_no_sphere(capsys):
    with pytest.raises(SystemExit) as stopped:
        age.parse_args(["--z-dim", "1"])
    assert stopped.value.code == 2 and "--z-dim 1 is too small" in capsys.readouterr().err


# The updates


def test_running_statistics_of_the_encoder_are_of_data_alone(start):
    """In eval mode it codes data; with the statistics of samples in them, a trained one lost 14 points."""
    run = start(age, COLOUR, "--lr", 1e-9)
    run.draws["x"].clear()
    alone = copy.deepcopy(run.nets["encoder"])
    for _ in range(3):
        run.iteration()
    for x in run.draws["x"]:
        alone(x)
    buffers = dict(alone.named_buffers())
    assert buffers and len(run.draws["x"]) == 3
    for name, expected in buffers.items():
        assert_close(run.nets["encoder"].get_buffer(name), expected, rtol=1e-4, atol=1e-5)


@each_case
def test_each_update_has_z_of_its_own(shape, flags, start):
    """One of E, then two of G, which alone draws no x."""
    run = start(age, shape, *flags)
    for draws in run.draws.values():
        draws.clear()
    for _ in range(2):
        run.iteration()
    assert [len(run.draws[key]) for key in "xz"] == [2, 6]
    assert len({tuple(z.flatten().tolist()) for z in run.draws["z"]}) == 6


@each_case
def test_gradients_and_numbers_are_those_of_the_paper(shape, flags, start):
    """Worked out again from the batches that were drawn; torch.distributions has the divergence."""
    run = start(age, shape, *flags, "--batch-size", 16, "--rec-weight", 3, "--code-weight", 7)
    for draws in run.draws.values():
        draws.clear()
    metrics, (encoder, generator) = run.iteration(), (run.nets["encoder"], run.nets["generator"])
    (x,), zs = run.draws["x"], list(run.draws["z"])

    def divergence(codes):
        fitted = Normal(codes.mean(0), codes.std(0, correction=0))
        return kl_divergence(fitted, Normal(torch.zeros(()), torch.ones(()))).mean()

    for z, (updated, before, _) in zip(zs, run.updates, strict=True):
        for name, net in run.nets.items():
            for weight, old in zip(net.parameters(), before[name][0], strict=True):
                weight.data.copy_(old)
        real, fake = encoder(x), encoder(generator(z))
        x_rec = generator(real)
        if updated == "encoder":
            loss = divergence(real) - divergence(fake) + 3 * (x - x_rec).abs().mean()
            numbers = {"KL(E(x))": divergence(real), "KL(E(G(z)))": divergence(fake)}
            numbers["reconstruction"] = (x - x_rec).abs().mean()
        else:
            loss = divergence(fake) + 7 * (z - fake).square().mean()
            numbers = {"code_error": (z - fake).square().mean()} if z is zs[-1] else {}
        for name, expected in numbers.items():
            assert_close(metrics[name], expected.detach(), rtol=1e-4, atol=1e-5)
            assert metrics[name].shape == () and not metrics[name].requires_grad
        expected = torch.autograd.grad(loss, [*run.nets[updated].parameters()])
        scale = max(grad.abs().max() for grad in expected)
        assert scale > 1e-3
        for grad, wanted in zip(before[updated][1], expected, strict=True):
            assert_close(grad / scale, wanted / scale, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("shape", [GREY, POINTS], ids=["images", "points"])
def test_encoder_and_generator_pull_the_samples_codes_opposite_ways(shape, configure):
    """By the divergences alone: E lowers that of data and raises that of samples, G lowers that."""
    config = configure(age, shape, "--network", "mlp", "--batch-size", 32, "--z-dim", 3)
    nets = nn.ModuleDict(age.networks(config)).double()
    x, z = normal(32, *shape), age.draw_z(32, config, "cpu").double()

    def numbers():
        with torch.no_grad():
            return [age.kl_to_prior(nets["encoder"](part)) for part in (x, nets["generator"](z))]

    for name, expected in {"encoder": (-1, 1), "generator": (0, -1)}.items():
        before = numbers()
        z_rec = nets["encoder"](nets["generator"](z))
        if name == "encoder":
            loss = age.encoder_loss(x, x, nets["encoder"](x), z_rec, 0)
        else:
            loss = age.generator_loss(z, z_rec, 0)
        weights = [*nets[name].parameters()]
        for weight, gradient in zip(weights, gradients(loss, *weights), strict=True):
            weight.data -= 1e-3 * gradient
        changes = [after - earlier for after, earlier in zip(numbers(), before, strict=True)]
        assert [int(change.sign()) for change in changes] == [*expected]


TERMS = {"Δ(E(x))": "z_hat", "Δ(E(G(z)))": "z_rec", "reconstruction": "x_rec"}


@pytest.mark.parametrize("shape", [GREY, POINTS], ids=["images", "points"])
@pytest.mark.parametrize("argument", TERMS.values(), ids=TERMS.keys())
def test_each_term_reaches_the_encoder(argument, shape, start, monkeypatch):
    """With the others cut off: each moves E by itself."""
    whole = age.encoder_loss

    def part(x, x_rec, z_hat, z_rec, weight):
        parts = {"x_rec": x_rec, "z_hat": z_hat, "z_rec": z_rec}
        kept = {name: a if name == argument else a.detach() for name, a in parts.items()}
        return whole(x, rec_weight=weight, **kept)

    monkeypatch.setattr(age, "encoder_loss", part)
    run = start(age, shape)
    run.iteration()
    (_, before, _) = run.updates[0]
    assert max(grad.abs().max() for grad in before["encoder"][1]) > 1e-4


@pytest.mark.parametrize("divergence, weight", [(0, 500), (1, 1e-9)], ids=["code error", "Δ(E(G(z)))"])
def test_each_term_reaches_the_generator(divergence, weight, start, monkeypatch):
    whole = age.kl_to_prior
    run = start(age, GREY, "--code-weight", weight)
    monkeypatch.setattr(age, "kl_to_prior", lambda codes: divergence * whole(codes))
    run.iteration()
    (_, before, _) = run.updates[1]
    assert max(grad.abs().max() for grad in before["generator"][1]) > 1e-4


@pytest.mark.parametrize("flag, name, i", [("--rec-weight", "encoder", 0), ("--code-weight", "generator", 1)])
def test_weights_are_factors_of_one_loss_each(flag, name, i, start):
    """The first gradients of E are linear in μ and know no λ, those of G the reverse."""
    found = {}
    for weight in (1, 2, 4):
        torch.manual_seed(1)
        run = start(age, GREY, flag, weight)
        run.optimizers["encoder"].param_groups[0]["lr"] = 0.0  # so that G sees the same codes
        run.iteration()
        for kind, (_, before, _) in zip(("encoder", "generator"), run.updates, strict=False):
            found[kind, weight] = torch.cat([grad.flatten() for grad in before[kind][1]])
    other = {"encoder": "generator", "generator": "encoder"}[name]
    step = found[name, 2] - found[name, 1]
    assert step.norm() > 1e-4
    assert_close(found[name, 4] - found[name, 2], 2 * step, rtol=1e-3, atol=1e-3 * step.norm().item())
    assert torch.equal(found[other, 1], found[other, 4])


# Learning, and pictures


def test_generator_and_encoder_learn_to_invert_each_other(configure):
    """Points on a circle, z on a sphere; at chance the errors are 0.64 and 2/3."""
    angles = 2 * math.pi * torch.arange(200) / 200
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    config = configure(age, POINTS, "--batch-size", 64, "--z-dim", 3, "--lr", 5e-3)
    *_, iteration, _ = age.build(config, (x, None), (x, None))
    metrics = [iteration() for _ in range(200)]
    for name in ("reconstruction", "code_error"):
        first, last = metrics[0][name], torch.stack([row[name] for row in metrics[-20:]]).mean()
        assert first > 0.5
        assert last < 0.7 * first


@pytest.mark.parametrize("shape", [COLOUR, POINTS], ids=["images", "points"])
def test_pictures(shape, start):
    """Data beside G(E(x)); neither the networks nor what is drawn next changes."""
    run = start(age, shape, x_test=torch.full((9, *shape), 7, dtype=torch.uint8) if shape == COLOUR else None)
    run.nets.eval()
    z = age.draw_z(6, run.config, "cpu")
    weights, random = [weight.clone() for weight in run.nets.state_dict().values()], torch.get_rng_state()
    with torch.no_grad():
        grids = run.pictures(z)
    assert list(grids) == ["samples", "reconstructions"]
    pairs = grids["reconstructions"][0]
    assert pairs.shape == (3, 2, *shape)
    x = run.x_test[:3] / 127.5 - 1 if shape == COLOUR else run.x_test[:3]
    assert_close(pairs[:, 0], x)
    with torch.no_grad():
        assert_close(pairs[:, 1], age.generate(run.nets, age.encode(run.nets, x)))
    assert equal(run.nets.state_dict().values(), weights) and torch.equal(torch.get_rng_state(), random)
