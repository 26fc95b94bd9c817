"""α-GAN: every loss and each update's gradient worked out by hand; codes and z in one batch.

test_training.py has what it shares with others: four separate updates, each loss alone.
"""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import alpha_gan

POINTS, GREY, COLOUR = [2], [1, 8, 8], [3, 8, 8]
CASES = [(COLOUR, ()), (GREY, ("--network", "mlp")), (POINTS, ())]

each_case = pytest.mark.parametrize("shape, flags", CASES, ids=["conv", "mlp", "points"])


def scores(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def sigmoid(*values):
    return torch.tensor([1 / (1 + math.exp(-value)) for value in values], dtype=torch.float64)


def images(*shape):
    return (torch.rand(shape, dtype=torch.float64) * 2 - 1).requires_grad_()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True)


# Each term alone


def test_the_ratio_is_minus_the_logit():
    """R(d) = −log d + log(1 − d) at d = sigmoid(a), and its derivative in a, −1."""
    a = scores(*torch.linspace(-6, 6, 25).tolist())
    d = 1 / (1 + (-a).exp())
    expected = -d.log() + (1 - d).log()
    ratio = alpha_gan.neg_log_ratio(a)
    assert_close(ratio, expected, atol=1e-9, rtol=0)
    assert_close(*gradients(ratio.sum(), a), *gradients(expected.sum(), a), atol=1e-9, rtol=0)
    for large in (-800.0, 800.0):  # where d is 0 or 1
        assert alpha_gan.neg_log_ratio(number(large)).item() == -large


def test_reconstruction_is_a_mean_absolute_error():
    x, x_rec = scores([[1, -1], [0.5, 0]]), scores([[0.5, -1.5], [1, 3]])
    error = alpha_gan.reconstruction_error(x, x_rec)
    assert_close(error, number((0.5 + 0.5 + 0.5 + 3) / 4))
    (gradient,) = gradients(error, x_rec)
    assert_close(gradient, number([[[-1.0, -1], [1, 1]]]) / 4)


@pytest.mark.parametrize("axis", range(4))
def test_reconstruction_does_not_grow_with_the_image_or_the_batch(axis):
    """Twice as many samples, channels, rows or columns alike leave a mean as it is; a sum would double."""
    x, x_rec = images(3, 1, 4, 4), images(3, 1, 4, 4)
    error = alpha_gan.reconstruction_error(x, x_rec)
    larger = alpha_gan.reconstruction_error(torch.cat([x, x], axis), torch.cat([x_rec, x_rec], axis))
    assert error > 0.1
    assert_close(larger, error)


@pytest.mark.parametrize("weight", [0.5, 1, 20])
def test_encoder_loss(weight):
    """λ E|x − G(E(x))| + R(C(E(x))): the code moves to where C finds the prior, at any distance alike."""
    x, x_rec, c_code = images(3, 1, 2, 2), images(3, 1, 2, 2), scores(-50, 2, 3)
    loss = alpha_gan.encoder_loss(x, x_rec, c_code, weight)
    assert_close(loss, weight * (x - x_rec).abs().sum() / 12 + 45 / 3)
    by_x_rec, by_code = gradients(loss, x_rec, c_code)
    assert_close(by_x_rec, weight * (x_rec - x).sign().detach() / 12)
    assert_close(by_code, torch.full((3,), -1 / 3).double())


@pytest.mark.parametrize("weight", [0.5, 1, 20])
def test_generator_loss(weight):
    """λ E|x − G(E(x))| + R(D(G(E(x)))) + R(D(G(z))): both kinds of samples move to where D finds data."""
    x, x_rec, d_rec, d_fake = images(3, 1, 2, 2), images(3, 1, 2, 2), scores(1, 2, 6), scores(-50, 2)
    loss = alpha_gan.generator_loss(x, x_rec, d_rec, d_fake, weight)
    assert_close(loss, weight * (x - x_rec).abs().sum() / 12 - 3 + 24)
    by_x_rec, by_rec, by_fake = gradients(loss, x_rec, d_rec, d_fake)
    assert_close(by_x_rec, weight * (x_rec - x).sign().detach() / 12)
    assert_close(by_rec, torch.full((3,), -1 / 3).double())
    assert_close(by_fake, torch.full((2,), -1 / 2).double())


def test_discriminator_loss():
    """−log D(x) − log(1 − D(G(E(x)))) − log(1 − D(G(z))), 1 : 1 : 1, each a mean of its own."""
    d_real, d_rec, d_fake = scores(1, -2, 0.5), scores(-1, 3), scores(0.3, 1, -2, 4)
    real, rec, fake = sigmoid(1, -2, 0.5), sigmoid(-1, 3), sigmoid(0.3, 1, -2, 4)
    loss = alpha_gan.discriminator_loss(d_real, d_rec, d_fake)
    assert_close(loss, -real.log().mean() - (1 - rec).log().mean() - (1 - fake).log().mean())
    by_real, by_rec, by_fake = gradients(loss, d_real, d_rec, d_fake)
    assert_close(by_real, -(1 - real) / 3)
    assert_close(by_rec, rec / 2)
    assert_close(by_fake, fake / 4)


def test_code_discriminator_loss():
    """−log C(z) − log(1 − C(E(x))): the prior is real; the first arXiv version has it the other way."""
    c_prior, c_code = scores(1, -2, 0.5), scores(-1, 3)
    prior, code = sigmoid(1, -2, 0.5), sigmoid(-1, 3)
    loss = alpha_gan.code_discriminator_loss(c_prior, c_code)
    assert_close(loss, -prior.log().mean() - (1 - code).log().mean())
    by_prior, by_code = gradients(loss, c_prior, c_code)
    assert_close(by_prior, -(1 - prior) / 3)
    assert_close(by_code, code / 2)


def test_losses_of_discriminators_that_know_nothing_or_too_much():
    """log 2 a term at D ≡ ½; finite, and nothing lost, where D or C is sure and wrong."""
    undecided, sure = torch.zeros(4).double(), torch.full((4,), 800.0).double()
    for loss, terms in ((alpha_gan.discriminator_loss, 3), (alpha_gan.code_discriminator_loss, 2)):
        assert_close(loss(*terms * [undecided]), number(terms * math.log(2)))
        assert_close(loss(-sure, *(terms - 1) * [-sure]), number(800.0))
        assert_close(loss(sure, *(terms - 1) * [sure]), number(800.0 * (terms - 1)))


def normal_quantiles(mean, n=20_000):
    """N(mean, 1) as n points of equal weight."""
    ranks = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return mean + math.sqrt(2) * torch.erfinv(2 * ranks - 1)


@pytest.mark.parametrize("mean", [-1.5, 0.7])
def test_the_best_code_discriminator_makes_the_ratio_the_kl_divergence(mean):
    """For codes from N(m, 1) its logit is log p/q = m²/2 − mz; then E R(C(ẑ)) = KL(q‖p) = m²/2, slope m."""
    z, z_hat = normal_quantiles(0.0), normal_quantiles(mean).requires_grad_()
    a, b = scores(mean**2 / 2), scores(-mean)
    loss = alpha_gan.code_discriminator_loss(a + b * z, a + b * z_hat)
    for gradient in gradients(loss, a, b):
        assert_close(gradient, number([0.0]), atol=1e-3, rtol=0)
    divergence = alpha_gan.encoder_loss(z, z, a + b * z_hat, 1)
    assert_close(divergence, number(mean**2 / 2), atol=1e-3, rtol=0)
    assert_close(gradients(divergence, z_hat)[0].sum(), number(mean))


def test_the_best_discriminator_lets_data_and_samples_meet():
    """Data N(3, 1), G(z) = z + b = G(E(x)), D its best, log p/q up to a constant: b ends at 3."""
    z, b = normal_quantiles(0.0, 1000), scores(0)
    for _ in range(50):
        logits = (3 - b.detach()) * (z + b) + (b.detach() ** 2 - 9) / 2
        loss = alpha_gan.generator_loss(z, z, logits, logits, 1)
        b = (b - 0.1 * gradients(loss, b)[0]).detach().requires_grad_()
    assert_close(b.item(), 3.0, atol=1e-3, rtol=0)


# The networks


@each_case
def test_the_code_discriminator_takes_each_code_by_itself(shape, flags, configure):
    """No batch norm: in train mode too, no score depends on another code."""
    net = alpha_gan.networks(configure(alpha_gan, shape, *flags))["code_discriminator"].double().train()
    assert not [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = gradients(net(z)[0], z)
    assert gradient[0].norm() > 0 and (gradient[1:] == 0).all()
    slopes = {module.negative_slope for module in net.modules() if isinstance(module, nn.LeakyReLU)}
    assert slopes == {0.2} and len(list(net.buffers())) == 0


# The updates


@each_case
def test_gradients_and_numbers_are_those_of_the_paper(shape, flags, start):
    """Worked out again, with log and sigmoid, from the four batches that were drawn.

    So E learns from C and not from D, G from D at reconstructions and samples and not from C, and D is
    shown both.
    """
    run = start(alpha_gan, shape, *flags, "--lambda", 7)
    for draws in run.draws.values():
        draws.clear()
    metrics, nets = run.iteration(), run.nets
    draws = {key: list(batches) for key, batches in run.draws.items()}
    for batches in (draws["x"], draws["z"]):
        assert len({tuple(batch.flatten().tolist()) for batch in batches}) == len(batches) == 4
    for i, (updated, before, _) in enumerate(run.updates):
        for name, net in nets.items():
            for weight, old in zip(net.parameters(), before[name][0], strict=True):
                weight.data.copy_(old)
        x, z = draws["x"][i], draws["z"][i]
        z_hat = nets["encoder"](x)
        x_rec, x_fake = nets["generator"](torch.cat([z_hat, z])).split(len(x))
        real, rec, fake = (nets["discriminator"](part).sigmoid() for part in (x, x_rec, x_fake))
        prior, code = (nets["code_discriminator"](part).sigmoid() for part in (z, z_hat))
        error = (x - x_rec).abs().mean()
        loss = {
            "encoder": 7 * error + (-code.log() + (1 - code).log()).mean(),
            "generator": 7 * error + sum((-d.log() + (1 - d).log()).mean() for d in (rec, fake)),
            "discriminator": -real.log().mean() - (1 - rec).log().mean() - (1 - fake).log().mean(),
            "code_discriminator": -prior.log().mean() - (1 - code).log().mean(),
        }[updated]
        numbers = {
            "encoder": {"reconstruction": error},
            "generator": {},
            "discriminator": {"D(x)": real.mean(), "D(G(E(x)))": rec.mean(), "D(G(z))": fake.mean()},
            "code_discriminator": {"C(z)": prior.mean(), "C(E(x))": code.mean()},
        }[updated]
        for name, expected in numbers.items():
            assert_close(metrics[name], expected.detach(), rtol=1e-4, atol=1e-6)
        expected = torch.autograd.grad(loss, [*nets[updated].parameters()])
        for grad, wanted in zip(before[updated][1], expected, strict=True):
            assert_close(grad, wanted, rtol=1e-3, atol=1e-5)
        assert max(grad.abs().max() for grad in expected) > 1e-4


@pytest.mark.parametrize("flag", ["--lambda", "--rec-weight"])
def test_both_names_of_lambda(flag, capsys):
    """An attribute cannot be called lambda; a message about it names a flag that exists."""
    assert alpha_gan.parse_args([flag, "2.5"]).rec_weight == 2.5
    with pytest.raises(SystemExit) as stopped:
        alpha_gan.parse_args([flag, "0"])
    assert stopped.value.code == 2
    assert "--rec-weight 0" in capsys.readouterr().err


def test_points_have_a_lambda_of_their_own():
    images, points = (alpha_gan.parse_args(["--dataset", name]) for name in ("mnist", "grid"))
    assert images.rec_weight == alpha_gan.DEFAULTS["rec_weight"] != points.rec_weight
    assert alpha_gan.parse_args(["--dataset", "grid", "--lambda", "4"]).rec_weight == 4


# A run


def test_codes_of_any_size_do_not_look_alike(start):
    """G's batch norm sees codes and z in one batch: by itself, a batch of tiny codes would be stretched."""
    run = start(alpha_gan, COLOUR, "--batch-size", 32)
    for weight in list(run.nets["encoder"].parameters())[-2:]:
        weight.data *= 1e-3
    outputs = []
    run.nets["generator"].register_forward_hook(lambda *call: outputs.append(call[-1].detach()))
    run.iteration()
    assert [len(x) for x in outputs] == 3 * [64]
    for x in outputs:
        assert x[:32].std(0).mean() < 0.2 * x[32:].std(0).mean()
