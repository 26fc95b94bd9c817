"""infogan.py: L_I in float64 against closed forms, z's parts, who learns from what, pictures of the codes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Normal, Uniform
from torch.testing import assert_close

import infogan

GREY, POINTS = [1, 8, 8], [2]


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def some_codes(n, categories, continuous=2):
    one_hot = F.one_hot(torch.arange(n) % categories, categories).double()
    return torch.cat([one_hot, 2 * torch.rand(n, continuous).double() - 1], dim=1)


# Objective


def test_mutual_information_is_that_of_the_distributions():
    logits, means, codes = normal(30, 5), normal(30, 2), some_codes(30, 5)
    categorical, continuous = infogan.mutual_information(logits, means, codes)
    q, p = Categorical(logits=logits), Categorical(logits=torch.zeros(5).double())
    assert_close(categorical, q.log_prob(codes[:, :5].argmax(1)).mean() + p.entropy())
    log_q, entropy = Normal(means, 1).log_prob(codes[:, 5:]), Uniform(-1, 1).entropy().double()
    assert_close(continuous, (log_q + entropy).sum(1).mean())


@pytest.mark.parametrize("k", [2, 10])
def test_bounds(k):
    """log K where Q is sure and right, 0 where it knows nothing; finite where it is sure and wrong."""
    codes, nothing = some_codes(60 * k, k), torch.zeros(60 * k, 2).double()
    sure = 800 * codes[:, :k]
    categorical, continuous = infogan.mutual_information(sure, codes[:, k:], codes)
    assert_close(categorical.item(), math.log(k))
    assert_close(continuous.item(), 2 * math.log(2) - math.log(2 * math.pi))  # −0.452
    categorical, continuous = infogan.mutual_information(0 * sure, nothing, codes)
    assert_close(categorical.item(), 0.0)
    below = codes[:, k:].square().sum(1).mean().item() / 2  # 1/3 on average
    assert_close(continuous.item(), 2 * math.log(2) - math.log(2 * math.pi) - below)
    assert_close(
        infogan.mutual_information(-sure, nothing, codes)[0].item(), math.log(k) - 800 - math.log(k - 1)
    )


def test_continuous_codes_add_up():
    logits, means, codes = normal(7, 3), normal(7, 2), some_codes(7, 3)
    _, both = infogan.mutual_information(logits, means, codes)
    _, first = infogan.mutual_information(logits, means[:, :1], codes[:, :4])
    _, second = infogan.mutual_information(logits, means[:, 1:], codes[:, [0, 1, 2, 4]])
    assert_close(both, first + second)


def test_ascending_it_moves_q_to_the_code():
    logits, means, codes = normal(4, 3), normal(4, 2), some_codes(4, 3)
    of_logits, of_means = torch.autograd.grad(
        sum(infogan.mutual_information(logits, means, codes)), (logits, means)
    )
    assert_close(
        of_logits, (codes[:, :3] - logits.softmax(1)) / 4
    )  # of logits: a softmax too many shows here
    assert_close(of_means, (codes[:, 3:] - means) / 4)


# z


def test_each_part_of_z_has_its_prior(configure):
    config = configure(infogan, GREY, "--codes", 4)
    z = infogan.draw_z(20000, config, torch.device("cpu"))
    assert z.shape == (20000, 5 + 4 + 2)
    noise, one_hot, continuous = z.split([5, 4, 2], dim=1)
    assert_close(noise.mean(0), torch.zeros(5), atol=0.03, rtol=0)
    assert_close(noise.T.cov(), torch.eye(5), atol=0.05, rtol=0)
    assert torch.equal(one_hot.unique(), torch.tensor([0.0, 1.0]))
    assert torch.equal(one_hot.sum(1), torch.ones(20000))
    assert_close(one_hot.mean(0), torch.full((4,), 0.25), atol=0.015, rtol=0)
    assert -1 <= continuous.min() < -0.99 and 0.99 < continuous.max() <= 1
    assert_close(continuous.T.cov(), torch.eye(2) / 3, atol=0.015, rtol=0)
    assert_close(continuous.square().square().mean(0), torch.full((2,), 0.2), atol=0.015, rtol=0)


@pytest.mark.parametrize("label", [3, torch.tensor([3, 0, 1, 3, 2, 0])])
def test_a_label_is_the_category(configure, label):
    config, device = configure(infogan, GREY, "--codes", 4), torch.device("cpu")
    torch.manual_seed(1)
    z = infogan.draw_z(6, config, device, label=label)
    expected = torch.as_tensor(label).expand(6)
    assert torch.equal(z[:, 5:9], F.one_hot(expected, 4).float())
    assert len(z[:, 9:].unique()) == 12


# The updates


def gradients(nets, name):
    return [weight.grad is not None for weight in nets[name].parameters()]


@pytest.mark.parametrize("shape, flags", [(GREY, ()), (GREY, ("--network", "mlp")), (POINTS, ())])
def test_the_heads_share_the_body_and_nothing_else(start, shape, flags):
    run = start(infogan, shape, *flags)
    x = torch.randn(8, *shape)
    run.nets.eval()
    d, logits, means = infogan.judge(run.nets, x)
    assert d.shape == (8,) and logits.shape == (8, 10) and means.shape == (8, 2)
    assert_close(d, run.nets["discriminator"](x))
    assert_close(infogan.classify(run.nets, x), logits.softmax(1))
    d.sum().backward(retain_graph=True)
    assert not any(gradients(run.nets, "code_head")) and all(gradients(run.nets, "discriminator"))
    run.nets.zero_grad()
    (logits.square().sum() + means.square().sum()).backward()
    *body, weight, bias = gradients(run.nets, "discriminator")
    assert all(gradients(run.nets, "code_head")) and all(body) and not weight and not bias


@pytest.mark.parametrize("shape", [GREY, POINTS])
def test_a_step_moves_its_networks_alone(start, shape):
    run = start(infogan, shape)
    run.iteration()
    assert [name for name, *_ in run.updates] == ["discriminator", "code_head", "generator"]
    groups = {"discriminator": {"discriminator", "code_head"}, "generator": {"generator"}}
    groups["code_head"] = groups["discriminator"]  # one backward pass gives the gradients of both
    for updated, before, after in run.updates:
        for name in run.nets:
            moved = {not torch.equal(a, b) for a, b in zip(before[name][0], after[name][0], strict=True)}
            assert moved == {name == updated}
            if name not in groups[updated]:
                assert before[name][1] == [None] * len(before[name][1])
    first, last = (state["generator"][0] for state in (run.initial, run.updates[1][2]))
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))


def moved_by(run):
    return {
        name
        for name, before, after in run.updates
        if not all(torch.equal(a, b) for a, b in zip(before[name][0], after[name][0], strict=True))
    }


@pytest.mark.parametrize(
    "term, moved",
    [
        ("discriminator_loss", {"discriminator"}),
        ("generator_loss", {"generator"}),
        ("categorical", {"discriminator", "code_head", "generator"}),
        ("continuous", {"discriminator", "code_head", "generator"}),
    ],
)
def test_each_term_alone_moves_its_networks(start, monkeypatch, term, moved):
    run = start(infogan, GREY)
    information = infogan.mutual_information

    def part(*args):
        categorical, continuous = information(*args)
        return categorical * (term == "categorical"), continuous * (term == "continuous")

    monkeypatch.setattr(infogan, "mutual_information", part)
    for other in {"discriminator_loss", "generator_loss"} - {term}:
        function = getattr(infogan, other)
        monkeypatch.setattr(infogan, other, lambda *args, function=function: 0 * function(*args))
    run.iteration()
    assert moved_by(run) == moved


@pytest.mark.parametrize("weights, alike", [((0, 0), True), ((1, 0), False), ((0, 1), False)])
def test_without_the_term_the_generator_does_not_hear_of_q(start, weights, alike):
    """Its gradient at two code heads, D being the same."""
    found = []
    for scale in (1, 3):
        run = start(infogan, GREY, "--code-weight", weights[0], "--continuous-weight", weights[1])
        for name in ("discriminator", "code_head"):
            run.optimizers[name].param_groups[0]["lr"] = 0.0
        with torch.no_grad():
            for weight in run.nets["code_head"].parameters():
                weight.mul_(scale)
        torch.manual_seed(2)
        run.iteration()
        found.append(run.updates[-1][1]["generator"][1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) == alike


def test_both_steps_ascend_the_information(start, monkeypatch):
    """dloss/dL_I is −1 in D's step, −λ in G's."""
    run = start(infogan, GREY, "--code-weight", 0.5, "--continuous-weight", 0.25)
    parts, slopes = [], []
    information, backward = infogan.mutual_information, torch.Tensor.backward

    def kept(*args):
        parts.append(information(*args))
        return parts[-1]

    def noted(loss, *args, **kwargs):
        found = torch.autograd.grad(loss, parts[-1], retain_graph=True)
        slopes.append([slope.item() for slope in found])
        backward(loss, *args, **kwargs)

    monkeypatch.setattr(infogan, "mutual_information", kept)
    monkeypatch.setattr(torch.Tensor, "backward", noted)
    run.iteration()
    assert slopes == [[-1, -1], [-0.5, -0.25]]


def test_the_generator_has_a_rate_of_its_own(start):
    run = start(infogan, GREY, "--lr", 3e-4, "--generator-lr", 7e-4)
    rates = {name: optimizer.defaults["lr"] for name, optimizer in run.optimizers.items()}
    assert rates == {"generator": 7e-4, "discriminator": 3e-4, "code_head": 3e-4}
    assert set(run.optimizers) == set(run.nets)


@pytest.mark.parametrize("weight", [0, 1])
def test_codes_are_told_where_the_information_is_asked_for(configure, weight):
    """And hardly where it is not, though Q learns there, too: of log 4 = 1.39, 1.33 and 0.15 were reached."""
    flags = ("--code-weight", weight, "--continuous-weight", 0, "--codes", 4)
    config = configure(infogan, GREY, *flags, "--z-dim", 30, "--batch-size", 32, "--lr", 1e-3)
    x = torch.randint(256, (50, *GREY), dtype=torch.uint8)
    _, _, iteration, _ = infogan.build(config, (x, None), (x, None))
    reached = [iteration()["L_I_categorical"].item() for _ in range(60)]
    last = sum(reached[-5:]) / 5
    assert last > 1.1 if weight else last < 0.4


# Data and pictures


@pytest.mark.parametrize("codes", [3, 17])
def test_it_needs_no_labels_and_any_number_of_codes(configure, codes):
    config = configure(infogan, GREY, "--codes", codes)
    x = torch.randint(256, (40, *GREY), dtype=torch.uint8)
    nets, _, iteration, _ = infogan.build(config, (x, None), (x, None))
    assert all(value.isfinite() for value in iteration().values())
    p = infogan.classify(nets, x / 127.5 - 1)
    assert p.shape == (40, codes)
    assert_close(p.sum(1), torch.ones(40))


def test_pictures_have_a_column_for_each_value_of_a_code(start):
    run = start(infogan, GREY, "--codes", 4)
    z = infogan.draw_z(64, run.config, torch.device("cpu"))
    run.nets.eval()
    grids = run.pictures(z)
    assert {name: columns for name, (_, columns) in grids.items()} == {
        "samples": 8,
        "codes": 4,
        "continuous-1": 10,
        "continuous-2": 10,
    }
    for name, place in {"continuous-1": 9, "continuous-2": 10}.items():
        assert grids[name][0].shape == (8, 10, *GREY)
        for j in (0, 9):
            at = z[:8].clone()
            at[:, place] = (-2, 2)[j == 9]
            assert_close(grids[name][0][:, j], infogan.generate(run.nets, at))
    for k in range(4):
        at = z[:8].clone()
        at[:, 5:9] = F.one_hot(torch.tensor(k), 4)
        assert_close(grids["codes"][0][:, k], infogan.generate(run.nets, at))


def test_a_resumed_run_is_the_same_run(tmp_path):
    small = ["--dataset", "swissroll", "--width", "2", "--batch-size", "8", "--device", "cpu"]
    small += ["--log-every", "1", "--code-weight", "0"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    infogan.main([*small, "--steps", "4", "--out", str(whole)])
    infogan.main([*small, "--steps", "2", "--out", str(halves)])
    infogan.main(["--resume", str(halves), "--steps", "4", "--device", "cpu"])
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True)["networks"] for out in (whole, halves))
    for name, weights in a.items():
        assert_close(b[name], weights, atol=0, rtol=0)
    assert (whole / "metrics.csv").read_text() == (halves / "metrics.csv").read_text()
