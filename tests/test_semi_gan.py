"""semi_gan.py: losses in float64 against a softmax over N + 1 classes, labelled items, updates."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import semi_gan

GREY, POINTS = [1, 8, 8], [2]
NORMED = [1, 16, 16]  # from here on D has batch norm
LABELS = ("--labels", "30")


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def with_fake(logits):
    """(N, classes) → log p of the classes and of FAKE, whose logit is 0: (N, classes + 1)."""
    return torch.cat([logits, torch.zeros(len(logits), 1).to(logits)], dim=1).log_softmax(1)


# Objective


def test_losses_are_those_of_a_softmax_over_the_classes_and_fake():
    real, fake, y = normal(5, 3), normal(4, 3), torch.tensor([0, 2, 1, 1, 0])
    log_p, log_q = with_fake(real), with_fake(fake)
    of_y = log_p[torch.arange(5), y]
    not_fake = log_p[:, :3].logsumexp(1)
    assert_close(semi_gan.labelled_loss(real, y), (not_fake - of_y).mean())
    expected = -not_fake.mean() / 2 - log_q[:, 3].mean() / 2
    assert_close(semi_gan.unlabelled_loss(real, fake), expected)
    assert_close(semi_gan.generator_loss(fake), -log_q[:, :3].logsumexp(1).mean())


def test_gradient_at_the_logit_of_fake_is_its_probability():
    """An item that is not FAKE pushes FAKE's logit, if it had one, down by p(FAKE)."""
    logits = normal(6, 4)
    extra = torch.zeros(6, 1, dtype=torch.float64, requires_grad=True)
    not_fake = logits.logsumexp(1) - torch.cat([logits, extra], dim=1).logsumexp(1)
    (slope,) = torch.autograd.grad(-not_fake.mean(), extra)
    (total,) = torch.autograd.grad(semi_gan.generator_loss(logits), logits)
    assert_close(slope.squeeze(1), with_fake(logits)[:, 4].exp() / 6)
    assert_close(total.sum(1), -slope.squeeze(1))  # the same, spread over the classes


def test_an_undecided_discriminator():
    """Of N equal logits 0, FAKE has 1 of N + 1 parts."""
    zeros = torch.zeros(2, 9, dtype=torch.float64)
    assert_close(semi_gan.labelled_loss(zeros, torch.tensor([3, 8])).item(), math.log(9))
    assert_close(semi_gan.unlabelled_loss(zeros, zeros).item(), -(math.log(0.9) + math.log(0.1)) / 2)
    assert_close(semi_gan.generator_loss(zeros).item(), -math.log(0.9))


def test_sure_logits_do_not_overflow():
    """Where a softmax and then a log gives infinity: −log e⁻⁹⁰⁰ is 900, and its gradient is whole."""
    high = torch.full((3, 4), 900.0, dtype=torch.float64, requires_grad=True)
    low = (-high.detach()).requires_grad_()
    assert_close(semi_gan.unlabelled_loss(high, low).item(), 0.0)
    wrong = semi_gan.unlabelled_loss(low, high)
    assert_close(wrong.item(), 900.0)
    fooled = semi_gan.generator_loss(low)
    assert_close(fooled.item(), 900 - math.log(4))
    (slope,) = torch.autograd.grad(fooled, low)
    assert_close(slope.sum().item(), -1.0)


def test_labelled_loss_leaves_realness_alone():
    """The classes' logits may all rise together, so that only the unlabelled loss says what is FAKE."""
    logits, y = normal(3, 5), torch.tensor([4, 0, 1])
    assert_close(semi_gan.labelled_loss(logits + 100, y), semi_gan.labelled_loss(logits, y))
    assert_close(semi_gan.labelled_loss(logits, y), F.nll_loss(logits.softmax(1).log(), y))


def test_generator_and_discriminator_pull_the_fakes_opposite_ways():
    fake = normal(4, 3)
    (of_g,) = torch.autograd.grad(semi_gan.generator_loss(fake), fake)
    (of_d,) = torch.autograd.grad(semi_gan.unlabelled_loss(normal(2, 3), fake), fake)
    assert (of_g < 0).all() and (of_d > 0).all()


def test_feature_matching_is_the_squared_distance_of_the_means():
    f_real = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]]).double()
    f_fake = torch.tensor([[0.0, 0.0], [2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    loss = semi_gan.feature_matching_loss(f_real, f_fake)
    assert_close(loss.item(), (3 - 1) ** 2 + (2 - 1) ** 2.0)
    loss.backward()
    assert_close(f_fake.grad, torch.tensor([[-2.0, -1.0]] * 2).double())


# The labelled items


def chosen(y, labels, seed=0, classes=4):
    config = semi_gan.parse_args(["--device", "cpu", "--labels", str(labels), "--seed", str(seed)])
    config.classes = classes
    return semi_gan.labelled_items(y, config)


def test_labelled_items_are_balanced_and_chosen_by_the_seed():
    y = torch.randint(4, (200,))
    before = torch.get_rng_state()
    items = chosen(y, 22)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(items.unique()) == 22
    assert y[items].bincount().tolist() == [6, 6, 5, 5]
    torch.manual_seed(1)
    assert torch.equal(chosen(y, 22), items)
    assert not torch.equal(chosen(y, 22, seed=1), items)


def test_all_items_can_be_labelled():
    y = torch.arange(4).repeat(3)
    assert chosen(y, 12).sort().values.tolist() == list(range(12))


def test_labels_that_cannot_be_are_refused():
    y = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    with pytest.raises(ValueError, match="--labels 3: .*4 classes"):
        chosen(y, 3)
    with pytest.raises(ValueError, match="--labels 11: 2 of class 3"):
        chosen(y, 11)
    with pytest.raises(ValueError, match="--labels 8: .* has only 1"):
        chosen(y, 8)
    with pytest.raises(ValueError, match="glyphs has no labels"):
        chosen(None, 8)


# The updates


def trained(config, train_set, test_set, steps=2):
    """The networks after some steps from the same start."""
    torch.manual_seed(0)
    nets, _, iteration, _ = semi_gan.build(config, train_set, test_set)
    for _ in range(steps):
        iteration()
    return nets


def same(nets, others):
    pairs = zip(nets.state_dict().values(), others.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def images(n, shape=GREY):
    return torch.randint(256, (n, *shape), dtype=torch.uint8), torch.arange(n) % 10


def test_labels_of_the_unlabelled_items_are_not_read(configure, monkeypatch):
    config, (x, y), test_set = configure(semi_gan, GREY, *LABELS), images(60), images(20)
    labelled = semi_gan.labelled_items(y, config)
    monkeypatch.setattr(semi_gan, "labelled_items", lambda y, config: labelled)
    others = torch.ones(60, dtype=torch.bool)
    others[labelled] = False
    nets = trained(config, (x, y), test_set)
    assert same(nets, trained(config, (x, torch.where(others, 9 - y, y)), test_set))
    assert not same(nets, trained(config, (x, torch.where(others, y, 9 - y)), test_set))


@pytest.mark.parametrize("flag, reads", [("--supervised", False), ("--no-unlabelled", False), (None, True)])
def test_which_runs_read_the_unlabelled_items(configure, flag, reads):
    config = configure(semi_gan, GREY, *LABELS, *([flag] if flag else []))
    (x, y), test_set = images(60), images(20)
    others = torch.ones(60, dtype=torch.bool)
    others[semi_gan.labelled_items(y, config)] = False
    inverted = torch.where(others[:, None, None, None], 255 - x, x)
    alike = same(trained(config, (x, y), test_set), trained(config, (inverted, y), test_set))
    assert alike is not reads


def test_held_out_items_leave_the_run_alone(configure):
    """Neither weights nor batch norm's statistics nor random numbers depend on them."""
    config, train_set = configure(semi_gan, NORMED, *LABELS), images(60, NORMED)
    nets = trained(config, train_set, images(20, NORMED))
    random = torch.get_rng_state()
    assert same(nets, trained(config, train_set, images(500, NORMED)))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in nets.modules())


def test_accuracies_are_over_the_classes_alone(start):
    """Where everything looks FAKE, too: the classes' logits 100 lower change no accuracy."""
    run = start(semi_gan, GREY, *LABELS, "--lr", 1e-30)
    run.nets.eval()
    x = semi_gan.as_float(run.x_test)
    p = semi_gan.classify(run.nets, x)
    assert_close(p.sum(1), torch.ones(9))
    run.nets.train()
    torch.manual_seed(1)
    before = run.iteration()
    with torch.no_grad():
        run.nets["discriminator"][-1].bias.sub_(100)
    torch.manual_seed(1)
    after = run.iteration()
    assert after["unlabelled_loss"] > before["unlabelled_loss"] + 30
    for name in ("accuracy", "test_accuracy"):
        assert 0 <= before[name] <= 1
        assert after[name] == before[name]


def test_the_logged_accuracy_is_that_of_eval_mode(start):
    run = start(semi_gan, NORMED, *LABELS, "--lr", 1e-30)
    with torch.no_grad():
        run.nets["discriminator"][-1].weight.normal_()
    metrics = run.iteration()
    run.nets.eval()
    p = semi_gan.classify(run.nets, semi_gan.as_float(run.x_test))
    assert_close(metrics["test_accuracy"], (p.argmax(1) == run.y_test).float().mean())


@pytest.mark.parametrize("shape", [GREY, POINTS])
@pytest.mark.parametrize("objective", ["non-saturating", "feature-matching"])
def test_a_step_of_one_network_leaves_the_other_alone(start, shape, objective):
    run = start(semi_gan, shape, "--labels", 50, "--objective", objective)
    run.iteration()
    assert [name for name, *_ in run.updates] == ["discriminator", "generator"]
    for updated, before, after in run.updates:
        for name in run.nets:
            moved = [not torch.equal(a, b) for a, b in zip(before[name][0], after[name][0], strict=True)]
            has_gradient = [gradient is not None for gradient in before[name][1]]
            assert set(moved) == set(has_gradient) == {name == updated}


TERMS = {
    "labelled_loss": {"discriminator"},
    "unlabelled_loss": {"discriminator"},
    "generator_loss": {"generator"},
    "feature_matching_loss": {"generator"},
}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_moves_its_network(start, monkeypatch, term):
    objective = "feature-matching" if term == "feature_matching_loss" else "non-saturating"
    run = start(semi_gan, GREY, *LABELS, "--objective", objective)
    for other in TERMS.keys() - {term}:
        function = getattr(semi_gan, other)
        monkeypatch.setattr(semi_gan, other, lambda *args, function=function: 0 * function(*args))
    run.iteration()
    moved = {
        name
        for name, before, after in run.updates
        if not all(torch.equal(a, b) for a, b in zip(before[name][0], after[name][0], strict=True))
    }
    assert moved == TERMS[term]


def test_supervised_trains_the_discriminator_on_the_labelled_loss_alone(start):
    run = start(semi_gan, GREY, *LABELS, "--supervised")
    torch.manual_seed(0)
    metrics = run.iteration()
    assert [name for name, *_ in run.updates] == ["discriminator"]
    assert metrics.keys() == {"labelled_loss", "accuracy", "test_accuracy"}
    assert run.pictures(run.draws["z"]) == {}


def test_without_unlabelled_items_the_loss_is_odenas(start):
    """The cross-entropy over N + 1 classes, and the class once more by half: see the file's docstring."""
    run = start(semi_gan, POINTS, "--labels", 50, "--no-unlabelled")
    run.draws["x"].clear()
    first = [weight.clone() for weight in run.nets["discriminator"].state_dict().values()]
    metrics = run.iteration()
    (x,), y, z = run.draws["x"], run.draws["y"][-1], run.draws["z"][0]
    discriminator = run.nets["discriminator"]
    discriminator.load_state_dict(dict(zip(discriminator.state_dict(), first, strict=True)))
    run.nets["generator"].load_state_dict(
        dict(zip(run.nets["generator"].state_dict(), run.initial["generator"][0], strict=True))
    )
    log_p = with_fake(discriminator(x))
    log_q = with_fake(discriminator(semi_gan.generate(run.nets, z)))
    nll = -(log_p[torch.arange(len(x)), y].mean() + log_q[:, -1].mean()) / 2
    total = metrics["labelled_loss"] / 2 + metrics["unlabelled_loss"]
    assert_close(total, nll.detach())


@pytest.mark.parametrize("classes", [3, 17])
@pytest.mark.parametrize("flags, shape", [((), GREY), (("--network", "mlp"), [3, 8, 8]), ((), POINTS)])
def test_any_number_of_classes(configure, classes, flags, shape):
    config = configure(semi_gan, shape, *flags)
    config.classes = classes
    nets = semi_gan.networks(config)
    p = semi_gan.classify(nets, semi_gan.generate(nets, semi_gan.draw_z(4, config, "cpu")))
    assert p.shape == (4, classes)
    assert_close(p.sum(1), torch.ones(4))


# Runs


@pytest.mark.parametrize("flags", [["--supervised"], ["--no-unlabelled", "--labels", "8"]])
def test_a_resumed_run_is_the_same_run(tmp_path, flags):
    small = ["--dataset", "ring", "--width", "2", "--batch-size", "8", "--device", "cpu", "--log-every", "1"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    semi_gan.main([*small, *flags, "--steps", "4", "--out", str(whole)])
    semi_gan.main([*small, *flags, "--steps", "2", "--out", str(halves)])
    semi_gan.main(["--resume", str(halves), "--steps", "4", "--device", "cpu"])
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True)["networks"] for out in (whole, halves))
    for name, weights in a.items():
        assert_close(b[name], weights, atol=0, rtol=0)
    assert (whole / "metrics.csv").read_text() == (halves / "metrics.csv").read_text()


@pytest.mark.parametrize("flags", [["--dataset", "swissroll"], ["--dataset", "grid", "--labels", "24"]])
def test_data_it_cannot_use_are_one_line(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        semi_gan.main([*flags, "--device", "cpu", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("semi_gan.py: ")]
    assert "has no labels" in line or "25 classes" in line
