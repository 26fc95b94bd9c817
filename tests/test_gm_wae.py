"""gm_wae.py: kernel, MMD and both objectives in float64 against loops; the prior; pre-training; --init."""

import math
from argparse import Namespace
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import gm_wae

SCALES = (0.1, 0.2, 0.5, 1, 2, 5, 10)
TINY = ["--dataset", "ring", "--device", "cpu", "--width", "2", "--batch-size", "4", "--log-every", "1"]
TINY += ["--pretrain-steps", "3"]


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def weights(n, components):
    return normal(n, components).softmax(1)


def prior(n, components, d, std=0.3):
    """One draw of each component in a row, and the weights 1/K."""
    z = torch.eye(components, d, dtype=torch.float64) + std * normal(n, components, d)
    return z, torch.full((n, components), 1 / components, dtype=torch.float64)


def settings(**changes):
    """A configuration for component_means and draw_z."""
    return Namespace(**{"z_dim": 4, "components": 4, "prior_std": 0.3} | changes)


# Kernel


@pytest.mark.parametrize("c", [0.3, 5.0])
def test_kernel_is_the_sum_over_scales(c):
    a, b = normal(5, 3), 3 * normal(4, 3)
    expected = torch.zeros(5, 4).double()
    for i, j, s in product(range(5), range(4), SCALES):
        squared = sum((a[i, d] - b[j, d]) ** 2 for d in range(3))
        expected[i, j] += c * s / (c * s + squared)
    assert_close(gm_wae.imq_kernel(a, b, c), expected, atol=1e-12, rtol=0)


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def test_kernel_on_cuda_is_the_same_without_cdist(monkeypatch):
    a, b = normal(5, 3).requires_grad_(), normal(4, 3)
    expected = gm_wae.imq_kernel(a, b, 0.7)
    monkeypatch.setattr(torch, "cdist", None)
    kernel = gm_wae.imq_kernel(a.as_subclass(OnCuda), b, 0.7).as_subclass(torch.Tensor)
    assert_close(kernel, expected)
    found, wanted = (torch.autograd.grad(k.square().sum(), a)[0] for k in (kernel, expected))
    assert_close(found, wanted)


def test_kernel_of_a_point_with_itself_is_the_number_of_scales():
    a = normal(6, 10).requires_grad_()
    kernel = gm_wae.imq_kernel(a, a, 5)
    assert_close(kernel.diagonal(), torch.full((6,), 7.0).double())
    assert_close(kernel, kernel.T)
    kernel.sum().backward()
    assert a.grad.isfinite().all()


def test_kernel_is_exact_for_close_points_far_from_0():
    """As ‖a‖² + ‖b‖² − 2ab in single precision the distance would be lost."""
    a = torch.full((30, 8), 100.0)
    b = a + 0.01
    assert_close(gm_wae.imq_kernel(a, b, 0.01), gm_wae.imq_kernel(a.double(), b.double(), 0.01).float())


# MMD


def looped(z_q, w_q, z_p, w_p):
    """The estimator, a pair of points at a time; c is half the dimension."""
    n, components, d = z_q.shape

    def k(a, b):
        squared = float((a - b).square().sum())
        return sum(d / 2 * s / (d / 2 * s + squared) for s in SCALES)

    value = 0.0
    for i, j in product(range(n), range(n)):
        for a, b in product(range(components), range(components)):
            if i != j:
                value += float(w_q[i, a] * w_q[j, b]) * k(z_q[i, a], z_q[j, b]) / (n * (n - 1))
                value += float(w_p[i, a] * w_p[j, b]) * k(z_p[i, a], z_p[j, b]) / (n * (n - 1))
            value -= 2 * float(w_q[i, a] * w_p[j, b]) * k(z_q[i, a], z_p[j, b]) / n**2
    return value


@pytest.mark.parametrize("n, components, d", [(4, 3, 2), (2, 1, 5), (5, 4, 3)])
def test_mmd_equals_a_double_loop(n, components, d):
    z_q, w_q, z_p = normal(n, components, d), weights(n, components), 1 + normal(n, components, d)
    w_p = weights(n, components)
    assert_close(gm_wae.mmd(z_q, w_q, z_p, w_p).item(), looped(z_q, w_q, z_p, w_p), atol=1e-10, rtol=0)


def test_mmd_is_0_on_average_where_q_is_p():
    """Within four standard errors, also if q finds the mixture with other weights, as an encoder may."""
    draws = []
    for _ in range(400):
        z_p, w_p = prior(8, 3, 4)
        k = torch.randint(3, (8,))
        z_q, w_q = prior(8, 3, 4)[0], nn.functional.one_hot(k, 3).double()
        draws.append(gm_wae.mmd(z_q, w_q, z_p, w_p))
    draws = torch.stack(draws)
    assert draws.min() < 0
    assert_close(draws.mean().item(), 0.0, atol=4 * draws.std().item() / 20, rtol=0)


def test_mmd_of_a_shifted_cloud_does_not_grow_with_n():
    values = {}
    for n in (8, 80):
        draws = []
        for _ in range(60 if n == 8 else 6):
            (z_q, w_q), (z_p, w_p) = prior(n, 2, 3), prior(n, 2, 3)
            draws.append(gm_wae.mmd(z_q + 0.7, w_q, z_p, w_p))
        values[n] = torch.stack(draws).mean()
    assert values[8] > 0.1
    assert_close(values[8], values[80], rtol=0.1, atol=0)


def test_mmd_tells_a_wide_shifted_cloud_from_the_prior():
    """The kernel's width fits: MMD(N(0, I), N(2, 9I)) is far from 0."""
    z_q, w = 3 * normal(60, 1, 10) + 2, torch.ones(60, 1).double()
    same, other = (gm_wae.mmd(z, w, normal(60, 1, 10), w) for z in (normal(60, 1, 10), z_q))
    assert other > 1 and same.abs() < 0.1


def test_descending_the_mmd_moves_a_shifted_cloud_to_the_prior():
    shift = torch.full((4,), 1.0, dtype=torch.float64, requires_grad=True)
    for _ in range(150):
        (z_q, w), (z_p, _) = prior(16, 4, 4), prior(16, 4, 4)
        loss = gm_wae.mmd(z_q + shift, w, z_p, w)
        shift.data -= 0.3 * torch.autograd.grad(loss, shift)[0]
    assert_close(shift.detach(), torch.zeros(4).double(), atol=0.1, rtol=0)


def test_descending_the_mmd_moves_weight_to_the_components_that_lack_it():
    logits = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        (z_q, _), (z_p, w_p) = prior(16, 3, 3), prior(16, 3, 3)
        loss = gm_wae.mmd(z_q, logits.softmax(0).expand(16, 3), z_p, w_p)
        logits.data -= 2 * torch.autograd.grad(loss, logits)[0]
    assert_close(logits.detach().softmax(0), torch.full((3,), 1 / 3).double(), atol=0.05, rtol=0)


# WAE


@pytest.mark.parametrize("n, shape", [(4, (1, 3, 3)), (2, (3, 2, 4)), (5, (2,))])
def test_wae_loss_equals_a_loop_over_the_components(n, shape):
    """c is the squared error of (x + 1)/2, summed over pixels and channels, and a mean over samples alone."""
    x, x_rec, q = normal(n, *shape), normal(n, 3, *shape), weights(n, 3)
    z_q, (z_p, w_p) = normal(n, 3, 4), prior(n, 3, 4)
    expected = 0.0
    for i, k in product(range(n), range(3)):
        error = (x[i] + 1) / 2 - (x_rec[i, k] + 1) / 2
        expected += float(q[i, k]) * float((error**2).sum()) / n
    loss, reconstruction, divergence = gm_wae.wae_loss(x, x_rec, q, z_q, z_p, 7.0).values()
    assert_close(reconstruction.item(), expected)
    assert_close(divergence.item(), looped(z_q, q, z_p, w_p), atol=1e-10, rtol=0)
    assert_close(loss, reconstruction + 7 * divergence)


def test_the_gradient_of_wae_loss_reaches_q_of_k():
    """∂/∂q(k|x_i) is the cost of k, over n: no sampling, no relaxation, nothing detached."""
    x, x_rec = normal(4, 1, 2, 2), normal(4, 3, 1, 2, 2)
    z_q, (z_p, _) = normal(4, 3, 5), prior(4, 3, 5)
    q, x_rec, z_q = (part.requires_grad_() for part in (weights(4, 3), x_rec, z_q))
    _, reconstruction, divergence = gm_wae.wae_loss(x, x_rec, q, z_q, z_p, 7.0).values()
    (gradient,) = torch.autograd.grad(reconstruction, q)
    assert_close(gradient, ((x[:, None] - x_rec) ** 2).sum((2, 3, 4)).detach() / 4 / 4)
    for part in torch.autograd.grad(divergence, (q, z_q)):
        assert (part != 0).all()


def test_the_reconstruction_grows_with_the_area():
    x, x_rec, q = normal(3, 1, 4, 4), normal(3, 2, 1, 4, 4), weights(3, 2)
    z = normal(3, 2, 2)
    losses = {
        "wae": lambda x, x_rec: gm_wae.wae_loss(x, x_rec, q, z, z, 1.0),
        "vae": lambda x, x_rec: gm_wae.elbo_loss(x, x_rec, q.log(), z, z, z[0], 1.0),
    }
    for loss in losses.values():
        one, double = loss(x, x_rec), loss(torch.cat([x, x], -1), torch.cat([x_rec, x_rec], -1))
        assert_close(double["reconstruction"], 2 * one["reconstruction"])
        assert_close(double["loss"] - one["loss"], one["reconstruction"])


# ELBO


def elbo_inputs(n=4, components=3, d=2, shape=(1, 2, 2)):
    """x, logits, log q(k|x), mean, log-variance, means, std"""
    mean, log_var = normal(n, components, d), normal(n, components, d)
    x, logits = torch.rand(n, *shape).double() * 2 - 1, normal(n, components, *shape)
    return x, logits, normal(n, components).log_softmax(1), mean, log_var, normal(components, d), 0.4


def test_elbo_loss_equals_a_loop_over_the_components():
    x, logits, log_q, mean, log_var, means, std = elbo_inputs()
    normals, bernoulli = torch.distributions.Normal, torch.distributions.Bernoulli
    expected = torch.zeros(3).double()
    for i in range(4):
        for k in range(3):
            q, target = log_q[i, k].exp(), (x[i] + 1) / 2
            likelihood = bernoulli(logits=logits[i, k], validate_args=False).log_prob(target).sum()
            posterior = normals(mean[i, k], log_var[i, k].exp().sqrt())
            kl = torch.distributions.kl_divergence(posterior, normals(means[k], std)).sum()
            expected += torch.stack([-q * likelihood, q * kl, q * (log_q[i, k] - math.log(1 / 3))]) / 4
    loss, *terms = gm_wae.elbo_loss(x, logits, log_q, mean, log_var, means, std).values()
    assert_close(torch.stack(terms), expected)
    assert_close(loss, expected.sum())


def test_elbo_is_exact_where_the_posterior_is():
    """If G ignores z, −ELBO at q = prior is −log p(x); K is not a factor of it."""
    logits, x = normal(2, 2, 2), torch.randint(2, (5, 2, 2, 2)).double()[:, 0] * 2 - 1
    for components in (1, 3):
        means, std = normal(components, 4), 0.7
        log_q = torch.full((5, components), -math.log(components), dtype=torch.float64)
        log_var = torch.full((5, components, 4), 2 * math.log(std), dtype=torch.float64)
        mean = means.expand(5, components, 4)
        same = logits[0].expand(5, components, 2, 2)
        loss, reconstruction, *kl = gm_wae.elbo_loss(x, same, log_q, mean, log_var, means, std).values()
        p = torch.where(x > 0, logits[0].sigmoid(), 1 - logits[0].sigmoid())
        assert_close(loss, -p.log().sum((1, 2)).mean())
        assert_close(torch.stack(kl), torch.zeros(2).double(), atol=1e-12, rtol=0)


def test_elbo_is_finite_where_q_of_k_is_certain_and_logits_are_large():
    x, logits, _, mean, log_var, means, std = elbo_inputs()
    scores = torch.tensor([[800.0, 0, 0]]).double().expand(4, 3).clone().requires_grad_()
    logits = (1000 * logits).requires_grad_()
    loss = gm_wae.elbo_loss(x, logits, scores.log_softmax(1), mean, log_var, means, std)["loss"]
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all() and logits.grad.isfinite().all()


def test_logits_belong_to_the_pictures(configure):
    """sigmoid(logit) is (G(z) + 1)/2, for both kinds of network; and no logit comes out of a rounded tanh."""
    for network, shape in product(("conv", "mlp"), ([1, 8, 8], [3, 8, 8])):
        nets = gm_wae.networks(configure(gm_wae, shape, "--network", network))
        for net in nets.values():
            net.eval()
        z = 20 * torch.randn(4, 5)
        logits = gm_wae.generate(nets, z, logits=True)
        assert logits.shape == (4, *shape)
        assert_close(logits.sigmoid(), (gm_wae.generate(nets, z) + 1) / 2)
        for weight in nets["generator"].parameters():
            weight.data *= 10
        assert gm_wae.generate(nets, z, logits=True).abs().max() > 100  # 1 − tanh² is 0 long before


# Prior


@pytest.mark.parametrize("z_dim, components", [(4, 4), (5, 2), (3, 1)])
def test_component_means_are_unit_vectors(z_dim, components):
    means = gm_wae.component_means(settings(z_dim=z_dim, components=components))
    assert torch.equal(means, torch.eye(z_dim)[:components])


def test_there_are_as_many_components_as_dimensions_unless_told():
    assert len(gm_wae.component_means(settings(z_dim=7, components=None))) == 7
    assert gm_wae.parse_args(["--device", "cpu"]).z_dim == 10


def test_too_many_components_are_refused(configure):
    with pytest.raises(ValueError, match="--components 7: --z-dim 5") as error:
        gm_wae.networks(configure(gm_wae, [1, 32, 32], "--components", 7))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("z_dim, components", [(4, 4), (3, 2)])
def test_prior(z_dim, components):
    config, n = settings(z_dim=z_dim, components=components, prior_std=0.1), 12_000
    means, z = gm_wae.component_means(config), gm_wae.draw_z(n, config, "cpu")
    assert z.shape == (n, z_dim) and z.dtype == torch.float32
    k = torch.cdist(z, means).argmin(1)  # at σ = 0.1 they are 14σ apart
    counts = torch.bincount(k, minlength=components) / n
    assert_close(counts, torch.full((components,), 1 / components), atol=5 * 0.5 / n**0.5, rtol=0)
    for i in range(components):
        for draws in (z[k == i], gm_wae.draw_z(n // components, config, "cpu", label=i)):
            error = 5 * 0.1 / len(draws) ** 0.5
            assert_close(draws.mean(0), means[i], atol=error, rtol=0)
            assert_close(draws.std(0), torch.full((z_dim,), 0.1), atol=error, rtol=0)
            assert_close(torch.corrcoef(draws.T), torch.eye(z_dim), atol=5 / len(draws) ** 0.5, rtol=0)


def test_what_iteration_draws(start, monkeypatch):
    """For each x a code of every q(z|k,x), with weight q(k|x), and a draw of every component, with 1/K."""
    found, seen = start(gm_wae, [1, 8, 8], "--pretrain-steps", 0), []
    mean, log_var = torch.randn(6, 5, 5), torch.full((6, 5, 5), 2 * math.log(0.7))
    monkeypatch.setattr(gm_wae, "component_codes", lambda nets, x: (mean, log_var))
    monkeypatch.setattr(gm_wae, "mmd", lambda *args: seen.append(args) or args[1].sum() * 0)
    for _ in range(100):
        found.iteration()
    z_q, w_q, z_p, w_p = (torch.stack(part).detach() for part in zip(*seen, strict=True))
    assert z_q.shape == z_p.shape == (100, 6, 5, 5) and w_q.shape == w_p.shape == (100, 6, 5)
    assert_close(w_p, torch.full((100, 6, 5), 0.2))
    assert_close(w_q.sum(2), torch.ones(100, 6))
    means, std = gm_wae.component_means(found.config), found.config.prior_std
    for noise in ((z_q - mean) / 0.7, (z_p - means) / std):
        assert_close(noise.mean(0), torch.zeros(6, 5, 5), atol=0.5, rtol=0)
        assert_close(noise.std(), torch.tensor(1.0), atol=0.03, rtol=0)
        pairs = noise.flatten(2).flatten(0, 1)  # each of its numbers is drawn by itself
        assert_close(torch.corrcoef(pairs.T), torch.eye(25), atol=0.25, rtol=0)


# Networks


@pytest.mark.parametrize("shape, network", [([3, 8, 8], "conv"), ([3, 7, 7], "mlp"), ([2], "mlp")], ids=str)
def test_codes(shape, network, configure):
    """The code of x is the mean of q(z|k,x) for its most probable k."""
    nets = gm_wae.networks(configure(gm_wae, shape, "--network", network, "--components", 3))
    for net in nets.values():
        net.eval()
    x = torch.rand(4, *shape) * 2 - 1
    mean, log_var = gm_wae.component_codes(nets, x)
    assert mean.shape == log_var.shape == (4, 3, 5)
    q, code = gm_wae.classify(nets, x), gm_wae.encode(nets, x)
    for i in range(4):
        assert_close(code[i], mean[i, q[i].argmax()])
    assert_close(nets["classifier"][-1](gm_wae.features(nets, x)).softmax(1), q)


def test_points_take_no_likelihood_of_pixels(configure):
    with pytest.raises(ValueError, match="--objective vae"):
        gm_wae.networks(configure(gm_wae, [2], "--objective", "vae"))


# Training


@pytest.mark.parametrize("objective, terms", [("wae", ["mmd"]), ("vae", ["kl_z", "kl_k"])])
def test_gradients_and_numbers_of_an_iteration(objective, terms, start):
    """Worked out again from what was drawn: all three networks get the gradient of the whole loss."""
    found = start(gm_wae, [1, 8, 8], "--objective", objective, "--pretrain-steps", 2)
    nets, config = found.nets, found.config
    found.draws["x"].clear()
    rng = torch.get_rng_state()
    metrics = found.iteration()
    (x,) = found.draws["x"]
    for name, net in nets.items():
        for weight, old in zip(net.parameters(), found.initial[name][0], strict=True):
            weight.data.copy_(old)
    torch.set_rng_state(rng)
    gm_wae.sample_batch(found.x_train, len(x))  # drawn before the codes
    q = nets["classifier"](x).softmax(1)
    mean, log_var = gm_wae.component_codes(nets, x)
    z_q = mean + (log_var / 2).exp() * torch.randn_like(mean)
    z_p = gm_wae.component_means(config) + config.prior_std * torch.randn_like(mean)
    flat = z_q.flatten(0, 1)
    if objective == "wae":
        x_rec = gm_wae.generate(nets, flat).view(6, 5, 1, 8, 8)
        errors = ((x[:, None] - x_rec) ** 2).sum((2, 3, 4)) / 4
        w_p = torch.full_like(q, 1 / 5)
        loss = (q * errors).sum(1).mean() + config.mmd_weight * gm_wae.mmd(z_q, q, z_p, w_p)
    else:
        logits = gm_wae.generate(nets, flat, logits=True).view(6, 5, 1, 8, 8)
        means, std = gm_wae.component_means(config), config.prior_std
        loss = gm_wae.elbo_loss(x, logits, q.log(), mean, log_var, means, std)["loss"]
    assert list(metrics) == ["loss", "reconstruction", *terms, "usage_min", "usage_max"]
    assert_close(metrics["loss"], loss.detach(), rtol=1e-4, atol=0)
    usage = q.mean(0).detach()
    assert_close((metrics["usage_min"], metrics["usage_max"]), (usage.min(), usage.max()))
    weights = list(nets.parameters())
    seen = [grad for name, before, _ in found.updates for grad in before[name][1]]
    for grad, wanted in zip(seen, torch.autograd.grad(loss, weights), strict=True):
        assert_close(grad, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item() + 1e-6)


@pytest.mark.parametrize("shape", [[1, 8, 8], [2]], ids=str)
def test_pictures(shape, start, monkeypatch):
    """The columns of a picture are the components, a row has one noise, halved in components-half."""
    found = start(gm_wae, shape, "--pretrain-steps", 0, "--components", 3)
    means = gm_wae.component_means(found.config)
    found.nets.eval()
    codes, fixed_z = [], gm_wae.draw_z(64, found.config, "cpu")
    monkeypatch.setattr(gm_wae, "generate", lambda nets, z: codes.append(z) or nets["generator"](z))
    with torch.no_grad():
        grids = found.pictures(fixed_z)
    assert list(grids) == ["samples", "reconstructions", "components", "components-half"]
    rows = 8 if len(shape) == 3 else 500
    whole, half = (z.unflatten(0, (rows, 3)) - means for z in codes[-2:])
    assert_close(half, whole / 2)
    assert_close(whole, whole[:, :1].expand_as(whole))  # the same noise in a row
    assert_close(whole[:, 0].std().item(), found.config.prior_std, rtol=0.5, atol=0)
    for name in ("components", "components-half"):
        x, columns = grids[name]
        assert x.shape == (rows, 3, *shape) and columns == 3


def matched(config, nets, x):
    """How far mean and standard deviation of each q(z|k) are from those of p(z|k), at most."""
    with torch.no_grad():
        mean, log_var = gm_wae.component_codes(nets, x)
        z = mean + (log_var / 2).exp() * torch.randn(200, *mean.shape)
    far = (z.mean((0, 1)) - gm_wae.component_means(config)).abs().max()
    return max(far.item(), (z.std((0, 1)) - config.prior_std).abs().max().item())


def test_pretraining_takes_every_component_to_its_prior(start):
    x = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8)
    flags, far = ["--batch-size", 64, "--components", 4, "--prior-std", 0.5], {}
    for steps in (0, 500):
        found = start(gm_wae, [1, 8, 8], *flags, "--pretrain-steps", steps, x_train=x)
        far[steps] = matched(found.config, found.nets, gm_wae.as_float(x))
        torch.manual_seed(found.config.seed)
        for name, net in gm_wae.networks(found.config).items():  # the others are as they were
            if name != "encoder":
                assert same(dict(net.state_dict()), dict(found.nets[name].state_dict()))
    assert far[0] > 0.5 and far[500] < 0.2


def test_moments_are_those_of_the_mixture_over_x():
    """By the law of total variance: E_x of the variances, plus the variance of the means."""
    mean, log_var, means = normal(5, 2, 3), normal(5, 2, 3), normal(2, 3)
    expected = 0.0
    for k, d in product(range(2), range(3)):
        m, v = mean[:, k, d], log_var[:, k, d].exp()
        variance = (v + m**2).mean() - m.mean() ** 2
        expected += (m.mean() - means[k, d]) ** 2 + (variance - 0.3**2) ** 2
    assert_close(gm_wae.moment_loss(mean, log_var, means, 0.3), expected)
    exact = means.expand(5, 2, 3), torch.full((5, 2, 3), 2 * math.log(0.3), dtype=torch.float64)
    assert_close(gm_wae.moment_loss(*exact, means, 0.3), torch.tensor(0.0).double(), atol=1e-14, rtol=0)


# Runs


def load(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def train(*flags):
    gm_wae.main([*TINY, *map(str, flags)])


def test_a_resumed_run_is_the_same_and_pretrains_once(tmp_path, monkeypatch):
    """Also if it was killed in its first step: step 0 holds the pre-trained networks."""
    calls, moment_loss = [], gm_wae.moment_loss
    monkeypatch.setattr(gm_wae, "moment_loss", lambda *args: calls.append(0) or moment_loss(*args))
    train("--steps", 6, "--out", tmp_path / "whole")
    assert len(calls) == 3
    train("--steps", 2, "--out", tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(gm_wae, "wae_loss", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("--steps", 6, "--out", tmp_path / "killed")
    assert len(calls) == 9 and load(tmp_path / "killed")["step"] == 0
    for out in (tmp_path / "parts", tmp_path / "killed"):
        torch.rand(5)
        gm_wae.main(["--resume", str(out), "--steps", "6", "--device", "cpu"])
        assert same(load(tmp_path / "whole"), load(out))
        for name in ("components", "components-half", "samples"):
            path = f"{name}/0000006.png"
            assert (tmp_path / "whole" / path).read_bytes() == (out / path).read_bytes()
    assert len(calls) == 9


def test_init_starts_from_another_runs_networks(tmp_path, monkeypatch):
    train("--steps", 2, "--out", tmp_path / "first")
    first = load(tmp_path / "first")
    monkeypatch.setattr(gm_wae, "moment_loss", None)  # without pre-training
    config = gm_wae.parse_args([*TINY, "--init", str(tmp_path / "first"), "--seed", "5"])
    config.shape, config.classes = [2], 8
    points = torch.randn(50, 2), None
    nets, *_ = gm_wae.build(config, points, points)
    for name, net in nets.items():
        assert same(dict(net.state_dict()), dict(first["networks"][name]))
    # It resumes without the first run.
    train("--steps", 3, "--init", tmp_path / "first", "--out", tmp_path / "second")
    (tmp_path / "first" / "checkpoint.pt").unlink()
    gm_wae.main(["--resume", str(tmp_path / "second"), "--steps", "5", "--device", "cpu"])
    assert load(tmp_path / "second")["step"] == 5


@pytest.mark.parametrize("wrong", ["missing", "damaged", "foreign", "other size", "other model"])
def test_a_wrong_init_gets_one_line(wrong, tmp_path, capsys):
    first = tmp_path / "first"
    train("--steps", 1, "--out", first)
    path, saved = first / "checkpoint.pt", load(first)
    if wrong == "missing":
        path.unlink()
    elif wrong == "damaged":
        path.write_bytes(path.read_bytes()[:1000])
    elif wrong == "foreign":
        torch.save([1, 2], path)
    elif wrong == "other model":
        del saved["networks"]["classifier"]
        torch.save(saved, path)
    capsys.readouterr()
    width = ["--width", 3] if wrong == "other size" else []
    with pytest.raises(SystemExit) as stopped:
        train("--steps", 1, *width, "--init", first, "--out", tmp_path / "second")
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gm_wae.py")]
    assert len(lines) == 1 and str(first) in lines[0]
    assert not (tmp_path / "second" / "checkpoint.pt").exists()


def test_a_gm_vae_starts_from_a_gm_wae(tmp_path):
    flags = ["--dataset", "glyphs", "--image-size", 8, "--z-dim", 3, "--steps", 1]
    train(*flags, "--out", tmp_path / "wae")
    train(*flags, "--objective", "vae", "--init", tmp_path / "wae", "--out", tmp_path / "vae")
    header = "step,loss,reconstruction,kl_z,kl_k,usage_min,usage_max"
    assert (tmp_path / "vae" / "metrics.csv").read_text().startswith(header)
    pictures = sorted(path.parent.name for path in (tmp_path / "vae").glob("*/0000001.png"))
    assert pictures == ["components", "components-half", "reconstructions", "samples"]
