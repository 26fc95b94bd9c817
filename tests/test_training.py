"""The update steps of every file: who moves when, by which gradients, on which draws.

test_bigan.py, test_gm_wae.py and test_alpha_gan.py have what only these models do.
"""

import inspect

import pytest
import torch
from conftest import MODELS, NEED_LABELS, having
from torch.testing import assert_close

import bigan
from common import as_float

POINTS, GREY, COLOUR = [2], [1, 8, 8], [3, 8, 8]
CASES = [
    ("dcgan", COLOUR),
    ("dcgan", GREY, "--objective", "minimax"),
    ("dcgan", POINTS),
    ("wgan", COLOUR),
    ("wgan", GREY, "--generator", "conv-plain", "--critic", "mlp"),
    ("wgan", POINTS),
    ("wgan_gp", COLOUR),
    ("wgan_gp", GREY, "--network", "mlp"),
    ("wgan_gp", POINTS),
    ("wbli", COLOUR),
    ("wbli", COLOUR, "--constraint", "clip"),
    ("wbli", GREY, "--network", "mlp"),
    ("wbli", POINTS),
]
STEPPED = [  # these, too, take --critic-steps
    *((name, shape) for name in ("cgan", "loss_sensitive_gan") for shape in (COLOUR, POINTS)),
    *((name, GREY, "--network", "mlp") for name in ("cgan", "loss_sensitive_gan")),
]
OTHER_CASES = [
    *STEPPED,
    *((name, shape) for name in ("bigan", "alpha_gan", "gm_wae", "age") for shape in (COLOUR, POINTS)),
    *((name, GREY, "--network", "mlp") for name in ("bigan", "alpha_gan", "age")),
    ("gm_wae", GREY, "--network", "mlp", "--objective", "vae"),
]
CLIPPED = [
    ("wgan", COLOUR),
    ("wgan", POINTS),
    ("wbli", COLOUR, "--constraint", "clip"),
    ("wbli", POINTS, "--constraint", "clip"),
]
FEW_LABELS = {"semi_gan": ["--labels", "50"]}  # as many as there are items
CRITIC = {"dcgan": "discriminator", "wgan": "critic", "wgan_gp": "critic", "wbli": "critic"}
UPDATES = {  # of an iteration: networks in a group share a loss or a forward pass; * is --critic-steps
    "dcgan": ["discriminator*", "generator"],
    "wgan": ["critic*", "generator"],
    "wgan_gp": ["critic*", "generator"],
    "bigan": ["generator encoder discriminator"],
    "wbli": ["critic*", "generator encoder"],
    "gm_wae": ["generator encoder classifier"],
    "alpha_gan": ["encoder", "generator", "discriminator", "code_discriminator"],
    "cgan": ["discriminator*", "generator"],
    "loss_sensitive_gan": ["critic*", "generator"],
    "age": ["encoder", "generator", "generator"],
}
TERMS = {  # what each function of the objective moves when the others are 0
    "dcgan": {"discriminator_loss": "discriminator", "generator_loss": "generator"},
    "wgan": {"critic_loss": "critic", "generator_loss": "generator"},
    "wgan_gp": {"critic_loss": "critic", "gradient_penalty": "critic", "generator_loss": "generator"},
    "bigan": {"discriminator_loss": "discriminator", "generator_encoder_loss": "generator encoder"},
    "wbli": {
        "critic_loss": "critic",
        "gradient_penalty": "critic",
        "generator_encoder_loss": "generator encoder",
    },
    "alpha_gan": {
        "encoder_loss": "encoder",
        "generator_loss": "generator",
        "discriminator_loss": "discriminator",
        "code_discriminator_loss": "code_discriminator",
    },
}


def each_case(cases):
    """The test once for each (model, shape, *flags)."""
    return pytest.mark.parametrize(
        "model, shape, flags",
        [(name, shape, flags) for name, shape, *flags in cases],
        indirect=["model"],
        ids=["-".join([name, str(shape).replace(" ", ""), *flags]) for name, shape, *flags in cases],
    )


def each(names):
    """The test for each of these files with conv nets and with points."""
    return each_case([(name, shape, *FEW_LABELS.get(name, [])) for name in names for shape in (GREY, POINTS)])


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def gradients(net):
    return [weight.grad for weight in net.parameters()]


def forget(run):
    for draws in run.draws.values():
        draws.clear()


def schedule(name, critic_steps):
    """UPDATES as lists of names."""
    found = []
    for group in UPDATES[name]:
        times = critic_steps if group.endswith("*") else 1
        found += times * [group.rstrip("*").split()]
    return found


def critic_steps(model, n):
    return ["--critic-steps", n] if "critic_steps" in model.DEFAULTS else []


# The updates: order, separation, clipping


@each_case(CASES + OTHER_CASES)
def test_each_update_moves_its_own_networks_alone(model, shape, flags, start):
    """In order, critics --critic-steps times before all others, from the first iteration on.

    Nothing else moves but for the clip after a critic's update; no other network has a gradient.
    """
    run = start(model, shape, *flags, *critic_steps(model, 2))
    assert set(run.optimizers) == set(run.nets)
    for name, net in run.nets.items():
        optimised = [weight for group in run.optimizers[name].param_groups for weight in group["params"]]
        assert [id(weight) for weight in optimised] == [id(weight) for weight in net.parameters()]
        assert gradients(net) == [None] * len(optimised)

    state, updates = run.initial, iter(run.updates)
    for _ in range(3):
        run.iteration()
        for group in schedule(model.__name__, 2):
            for position, expected in enumerate(group):
                updated, before, after = next(updates)
                assert updated == expected
                for name in run.nets:
                    clipped = "clip" in vars(run.config) and name == CRITIC[model.__name__]
                    assert clipped or equal(before[name][0], state[name][0])
                    assert equal(after[name][0], before[name][0]) == (name != updated)
                    waiting = name in group[position:]
                    assert {grad is not None for grad in before[name][1]} == {waiting}
                state = after
    assert next(updates, None) is None
    for net in run.nets.values():
        assert set(gradients(net)) == {None}


@each_case(CASES + STEPPED)
@pytest.mark.parametrize("steps", [1, 3])
def test_every_update_has_draws_of_its_own(model, shape, flags, steps, start):
    run = start(model, shape, *flags, "--critic-steps", steps)
    forget(run)
    for _ in range(3):
        run.iteration()
    assert len(run.draws["z"]) == 3 * (steps + 1)
    assert len(run.draws["x"]) == 3 * (steps + hasattr(model, "encode"))
    for batches in (run.draws["x"], run.draws["z"]):
        assert {len(batch) for batch in batches} == {run.config.batch_size}
        assert len({tuple(batch.flatten().tolist()) for batch in batches}) == len(batches)


@each_case(CLIPPED)
def test_weights_are_clipped_after_every_critic_update(model, shape, flags, start):
    """All of the critic's, so that nothing ever sees it outside [−c, c], and no other network's."""
    c = 0.03
    run = start(model, shape, *flags, "--clip", c, "--lr", 0.05, "--critic-steps", 2)
    critic, largest = run.nets["critic"], []
    for weight in critic.parameters():
        weight.data += 0.1
    critic.register_forward_pre_hook(
        lambda *_: largest.append(max(weight.abs().max().item() for weight in critic.parameters()))
    )
    for _ in range(3):
        run.iteration()
    limit = torch.tensor(c).item()
    first = next(i for i, size in enumerate(largest) if size <= limit)
    assert 1 <= first <= 2 < len(largest)  # in its first update the critic is seen once or twice
    assert set(largest[first:]) == {limit}
    assert max(weight.abs().max() for weight in critic.parameters()) == limit
    for updated, _, after in run.updates:  # as the optimiser leaves it
        largest_now = max(weight.abs().max() for weight in after["critic"][0])
        assert largest_now > 2 * limit if updated == "critic" else largest_now == limit
        for name in run.nets.keys() - {"critic"}:
            assert max(weight.abs().max() for weight in after[name][0]) > 2 * limit


# What each loss is made of and reaches


def wide(model):
    """No clipping to speak of: the papers' c leaves next to no gradients."""
    return ["--clip", 10] if hasattr(model, "clip_weights") else []


def stand_in(critic, *pairs):
    """In the place of gradient_penalty: without chance, and different for all its arguments."""
    real, fake = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    return critic(*real).square().mean() + 3 * critic(*fake).square().mean()


def wasserstein(f_real, f_fake):
    """The critic's loss and the others'."""
    return f_fake.mean() - f_real.mean(), f_real.mean() - f_fake.mean()


def non_saturating(d_real, d_fake):
    d_real, d_fake = d_real.sigmoid(), d_fake.sigmoid()
    return -d_real.log().mean() - (1 - d_fake).log().mean(), -d_fake.log().mean()


def minimax(d_real, d_fake):
    loss, _ = non_saturating(d_real, d_fake)
    return loss, -loss


@each_case(CASES)
def test_gradients_are_those_of_the_objective(model, shape, flags, start, monkeypatch):
    """Worked out again from the batches that were drawn; W is what the critic maximised last."""
    objective = wasserstein if CRITIC[model.__name__] == "critic" else non_saturating
    objective = minimax if "minimax" in flags else objective
    joint = hasattr(model, "encode")
    penalised = hasattr(model, "gradient_penalty") and "clip" not in flags
    if penalised:
        monkeypatch.setattr(model, "gradient_penalty", stand_in)
        flags = [*flags, "--gp-weight", 0.7]
    run = start(model, shape, *flags, *wide(model), "--critic-steps", 2)
    forget(run)
    metrics = run.iteration()
    nets, batches = run.nets, {key: list(draws) for key, draws in run.draws.items()}
    generator, critic = nets["generator"], nets[CRITIC[model.__name__]]
    for i, (updated, before, _) in enumerate(run.updates):
        for name, net in nets.items():
            for weight, old in zip(net.parameters(), before[name][0], strict=True):
                weight.data.copy_(old)
        i = min(i, 2)  # two updates of the critic, then one of all others
        z, x = batches["z"][i], batches["x"][i if joint else min(i, 1)]
        real, fake = ((x, nets["encoder"](x)), (generator(z), z)) if joint else ((x,), (generator(z),))
        loss_of_critic, loss = objective(critic(*real), critic(*fake))
        if i == 1 and "W" in metrics:
            assert_close(metrics["W"], -loss_of_critic.detach())
        if updated == CRITIC[model.__name__]:
            loss = loss_of_critic + (0.7 * stand_in(critic, *real, *fake) if penalised else 0)
        expected = torch.autograd.grad(loss, [*nets[updated].parameters()], materialize_grads=True)
        for grad, wanted in zip(before[updated][1], expected, strict=True):
            assert_close(grad, wanted, rtol=1e-3, atol=1e-7)
        assert max(grad.abs().max() for grad in expected) > 1e-5


@each(["wgan_gp", "wbli"])
def test_real_and_fake_share_a_call_of_the_critic(model, shape, flags, start):
    """The other call of a critic step is the penalty's."""
    run, sizes = start(model, shape, *flags, "--critic-steps", 2), []
    run.nets["critic"].register_forward_hook(lambda *call: sizes.append(len(call[2])))
    run.iteration()
    n = run.config.batch_size
    assert sizes[:4] == [2 * n, n, 2 * n, n]


@pytest.mark.parametrize("term", [(name, term) for name in TERMS for term in TERMS[name]], ids="-".join)
@pytest.mark.parametrize("shape", [GREY, POINTS], ids=["images", "points"])
def test_each_term_moves_its_networks_and_no_others(term, shape, start, monkeypatch):
    name, function = term
    model = __import__(name)

    def zero(*arguments):
        return 0 * sum(part.mean() for part in arguments if isinstance(part, torch.Tensor))

    for other in TERMS[name].keys() - {function}:
        monkeypatch.setattr(model, other, zero)
    no_decay = ["--weight-decay", 0] * ("weight_decay" in model.DEFAULTS)
    run = start(model, shape, *wide(model), *no_decay)
    run.iteration()
    moved = [name for name, net in run.nets.items() if not equal(net.parameters(), run.initial[name][0])]
    assert " ".join(moved) == TERMS[name][function]


@each(["bigan", "wbli"])
@pytest.mark.parametrize("half, reached", [(0, "encoder"), (1, "generator")])
def test_each_half_of_a_joint_loss_reaches_one(model, shape, flags, half, reached, start, monkeypatch):
    """The loss of D or F at (x, E(x)) alone teaches E, that at (G(z), z) alone teaches G."""
    both = model.generator_encoder_loss

    def one(*scores):
        return both(*(part if i == half else part.detach() for i, part in enumerate(scores)))

    monkeypatch.setattr(model, "generator_encoder_loss", one)
    run = start(model, shape, *flags)
    run.iteration()
    for updated, before, _ in run.updates:
        if updated in ("encoder", "generator"):
            moved = any(grad is not None and (grad != 0).any() for grad in before[updated][1])
            assert moved == (updated == reached)


@each_case(
    [(name, shape) for name in ("bigan", "wbli") for shape in (GREY, POINTS)]
    + [("wbli", GREY, "--constraint", "clip"), ("bigan", GREY, "--network", "mlp")]
)
def test_a_constant_critic_teaches_nothing(model, shape, flags, start):
    """No reconstruction term: all that generator and encoder learn comes through the critic."""
    run = start(model, shape, *flags)
    critic = list(run.nets.values())[-1]
    for weight in critic.parameters():
        weight.data.zero_()
    run.iteration()
    for updated, before, _ in run.updates:
        if updated in ("encoder", "generator"):
            assert all((grad == 0).all() for grad in before[updated][1])


# iteration() and pictures(z)


@each(MODELS)
@pytest.mark.parametrize("items", [50, 3])
def test_iteration_returns_numbers_without_a_past(model, shape, flags, items, start):
    """Finite, also if there are fewer items than a batch holds."""
    if items == 3 and model.__name__ in NEED_LABELS:
        pytest.skip("these need an item of each class")
    x = torch.randn(items, 2) if shape == POINTS else torch.randint(256, (items, *shape)).byte()
    run = start(model, shape, *flags, "--batch-size", 16, x_train=x)
    assert not inspect.signature(run.iteration).parameters
    forget(run)
    found = [run.iteration() for _ in range(2)]
    assert found[0] and list(found[0]) == list(found[1])
    for metrics in found:
        for value in metrics.values():
            assert isinstance(value, torch.Tensor) and value.shape == () and value.isfinite()
            assert not value.requires_grad and value.grad_fn is None
    assert len({tuple(value.item() for value in metrics.values()) for metrics in found}) == 2
    if model.__name__ in UPDATES:
        assert {len(batch) for batches in run.draws.values() for batch in batches} == {16}


@each_case(
    [
        (name, [channels, size, size], "--network", network, *FEW_LABELS.get(name, []))
        for name in MODELS
        for channels, size in ((1, 32), (3, 64))
        for network in ("conv", "mlp")
    ]
)
def test_every_size(model, shape, flags, start):
    run = start(model, shape, *flags, "--batch-size", 2, *critic_steps(model, 1))
    for _ in range(2):
        assert all(value.isfinite() for value in run.iteration().values())


@each(MODELS)
def test_the_seed_fixes_training(model, shape, flags, start):
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(3)  # of the data
        run = start(model, shape, *flags, "--seed", seed)
        run.iteration()
        found.append([weight for net in run.nets.values() for weight in net.parameters()])
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


@each(MODELS)
def test_pictures_change_nothing(model, shape, flags, start):
    """Called as train() does: in eval mode. Neither weights nor statistics nor random numbers move."""
    run = start(model, shape, *flags)
    run.iteration()
    before = {name: value.clone() for name, value in run.nets.state_dict().items()}
    n = 30
    z, rng = model.draw_z(n, run.config, torch.device("cpu")), torch.get_rng_state()
    run.nets.eval()
    with torch.no_grad():
        pictures, again = run.pictures(z), run.pictures(z)
        samples = model.generate(run.nets, z)
    after = run.nets.state_dict()
    assert list(after) == list(before) and equal(after.values(), before.values())
    assert torch.equal(torch.get_rng_state(), rng)

    assert samples.shape == (n, *shape)
    assert_close(pictures["samples"][0], samples)
    assert list(again) == list(pictures)
    assert equal([x for x, _ in again.values()], [x for x, _ in pictures.values()])
    assert all(columns > 0 for _, columns in pictures.values())
    assert ("reconstructions" in pictures) == hasattr(model, "encode")
    if hasattr(model, "encode"):  # pairs, as many as there are test images, half as many as z at most
        x = as_float(run.x_test[: n // 2])
        with torch.no_grad():
            x_rec = model.generate(run.nets, model.encode(run.nets, x))
        assert_close(pictures["reconstructions"][0], torch.stack([x, x_rec], dim=1))


# Optimisers and their rates

RMSPROP = "RMSprop", {"alpha": 0.99, "momentum": 0, "centered": False, "weight_decay": 0, "eps": 1e-8}


def adam(*betas, weight_decay=0):
    return "Adam", {"betas": betas, "weight_decay": weight_decay, "amsgrad": False, "eps": 1e-8}


@pytest.mark.parametrize(
    "model, flags, expected, lr",
    [
        ("dcgan", [], adam(0.5, 0.999), 2e-4),
        ("wgan", [], RMSPROP, 5e-5),
        ("wgan", ["--lr", 3e-4], RMSPROP, 3e-4),
        ("wgan_gp", [], adam(0.5, 0.9), 1e-4),
        ("bigan", [], adam(0.5, 0.999, weight_decay=5e-5), 2e-4),
        ("bigan", ["--weight-decay", 0.1, "--lr", 3e-4], adam(0.5, 0.999, weight_decay=0.1), 3e-4),
        ("wbli", [], adam(0.5, 0.9), 5e-4),
        ("wbli", ["--constraint", "clip", "--lr", 3e-4], RMSPROP, 3e-4),
        ("gm_wae", [], adam(0.5, 0.999), 5e-4),
        ("alpha_gan", [], adam(0.5, 0.9), 5e-4),
    ],
    indirect=["model"],
)
def test_optimizers(model, flags, expected, lr, start):
    """The papers', in all networks; the rule is what its name says, in its first step."""
    kind, settings = expected
    run = start(model, GREY, *flags)
    for optimizer in run.optimizers.values():
        (group,) = optimizer.param_groups
        assert type(optimizer).__name__ == kind
        assert {name: group[name] for name in settings} == settings
        assert group["lr"] == lr and not group.get("decoupled_weight_decay")
    run.iteration()
    factor = {"RMSprop": (1 - 0.99) ** 0.5, "Adam": 1}[kind]  # of |g|
    firsts = {update[0]: update for update in reversed(run.updates)}
    assert firsts.keys() == run.nets.keys()
    for name, before, after in firsts.values():
        for weight, grad, moved in zip(*before[name], after[name][0], strict=True):
            grad = grad + settings["weight_decay"] * weight
            wanted = weight - lr * grad / (factor * grad.abs() + 1e-8)
            assert_close(moved, wanted, atol=lr / 100, rtol=0)


@pytest.mark.parametrize("model", ["wgan", "wbli"], indirect=True)
def test_clip_is_the_papers_unless_given(model, configure):
    assert configure(model, GREY).clip == 0.01
    assert configure(model, GREY, "--clip", 0.2).clip == 0.2


def rates(model, config, optimizers, steps):
    """The rate that every optimiser has at these steps."""
    found = []
    for step in steps:
        model.set_rate(optimizers, config, step)
        (rate,) = {float(group["lr"]) for o in optimizers.values() for group in o.param_groups}
        found.append(rate)
    return torch.tensor(found)


@pytest.mark.parametrize("total", [4, 1000])
def test_the_rate_decays_by_absolute_steps(total, start):
    """By the same factor in each step, whatever --steps is; bigan.py's function is that of all files."""
    flags = ["--steps", total, "--lr", 0.01, "--decay-start", 3, "--decay-end", 7]
    run = start(bigan, POINTS, *flags)
    expected = 3 * [0.01] + [0.01 * 0.01 ** (late / 4) for late in (1, 2, 3, 4)] + 2 * [1e-4]
    assert_close(rates(bigan, run.config, run.optimizers, range(1, 10)), torch.tensor(expected))
    run.config.decay_end = 1  # before its start: it falls at once
    assert_close(rates(bigan, run.config, run.optimizers, (3, 4)), torch.tensor([0.01, 1e-4]))


def test_bigan_decays_as_in_its_paper(start):
    """200 epochs of MNIST, 469 batches each, at one rate, 200 down to a hundredth; the others do not."""
    run = start(bigan, GREY, "--network", "mlp")
    steps, shares = zip((1, 1), (93_800, 1), (140_700, 0.1), (187_600, 0.01), (300_000, 0.01), strict=True)
    assert_close(rates(bigan, run.config, run.optimizers, steps), 2e-4 * torch.tensor(shares))
    assert having("decay_start") == ["bigan"]


def test_a_graph_reads_the_rate_from_one_tensor(start):
    run = start(bigan, POINTS, "--decay-start", 1, "--decay-end", 3)
    groups = [group for optimizer in run.optimizers.values() for group in optimizer.param_groups]
    for group in groups:
        group["capturable"] = True
    bigan.set_rate(run.optimizers, run.config, 1)
    before = [group["lr"] for group in groups]
    bigan.set_rate(run.optimizers, run.config, 3)
    for group, lr in zip(groups, before, strict=True):
        assert group["lr"] is lr and isinstance(lr, torch.Tensor)
        assert_close(lr.item(), 2e-6)


# Learning, on two-dimensional toys


@pytest.mark.parametrize("model", ["wgan"], indirect=True)
def test_wgan_learns_a_gaussian(model, configure):
    """Data N(3, 1): pushed the wrong way, the samples run off to infinity or stay at 0."""
    x = torch.randn(2000, 2) + 3
    config = configure(model, POINTS, "--batch-size", 128, "--lr", 5e-4, "--clip", 0.1)
    nets, _, iteration, _ = model.build(config, (x, None), (x, None))
    x_fake = []
    for step in range(200):
        iteration()
        if step >= 160:  # it swings about its end
            with torch.no_grad():
                x_fake.append(model.generate(nets, model.draw_z(500, config, "cpu")))
    x_fake = torch.cat(x_fake)
    assert_close(x_fake.mean(0), torch.full((2,), 3.0), atol=1, rtol=0)
    assert_close(x_fake.std(0), torch.ones(2), atol=0.75, rtol=0)


@pytest.mark.parametrize("model", ["wbli"], indirect=True)
def test_wbli_learns_a_gaussian_in_both_directions(model, configure):
    """Samples like the data, and G(E(x)) near x, though no term asks for it."""
    mean, std = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.5])
    x = mean + std * torch.randn(2000, 2)
    flags = ["--z-dim", 2, "--batch-size", 128, "--lr", 2e-3, "--gp-weight", 1]
    config = configure(model, POINTS, *flags)
    nets, _, iteration, _ = model.build(config, (x, None), (x, None))
    w = torch.stack([iteration()["W"] for _ in range(150)])
    assert w[-20:].mean() < 0.7 * w[:20].mean()
    with torch.no_grad():
        x_fake = model.generate(nets, model.draw_z(2000, config, "cpu"))
        x_rec = model.generate(nets, model.encode(nets, x))
    assert_close(x_fake.mean(0), mean, atol=0.5, rtol=0)
    assert_close(x_fake.std(0), std, atol=0.35, rtol=0)
    error, of_chance = (x_rec - x).norm(dim=1).mean(), (x_rec - x.roll(1, 0)).norm(dim=1).mean()
    assert error < 0.6 * of_chance  # a quarter to a third, typically
