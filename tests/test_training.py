"""The update steps of every model file, through what train() hands to run(). A new file joins the tables."""

import inspect
import math

import pytest
import torch
from torch.testing import assert_close

from common import as_float

POINTS, GREY, COLOUR = [2], [1, 8, 8], [3, 8, 8]
CASES = [
    ("dcgan", COLOUR),
    ("dcgan", GREY, "--objective", "minimax"),
    ("dcgan", POINTS),
    ("wgan", COLOUR),
    ("wgan", GREY, "--network", "mlp"),
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
SHORT = ("--pretrain-steps", "2")
NO_CRITIC = [  # what a critic does to others is nothing to these; test_gm_wae.py says what they do
    ("gm_wae", COLOUR, *SHORT),
    ("gm_wae", GREY, "--network", "mlp", "--objective", "vae", *SHORT),
    ("gm_wae", POINTS, *SHORT),
]
CLIPPED = [
    ("wgan", COLOUR),
    ("wgan", POINTS),
    ("wbli", COLOUR, "--constraint", "clip"),
    ("wbli", POINTS, "--constraint", "clip"),
]
CRITIC = {"dcgan": "discriminator", "wgan": "critic", "wgan_gp": "critic", "wbli": "critic"}
OTHERS = {"dcgan": ["generator"], "wgan": ["generator"], "wgan_gp": ["generator"]}  # updated after it
OTHERS |= {"wbli": ["generator", "encoder"]}
JOINT = ["wbli"]  # the critic takes x and z
TERMS = {  # what each function of the objective moves when the others are 0
    "dcgan": {"discriminator_loss": ["discriminator"], "generator_loss": ["generator"]},
    "wgan": {"critic_loss": ["critic"], "generator_loss": ["generator"]},
    "wgan_gp": {"critic_loss": ["critic"], "gradient_penalty": ["critic"], "generator_loss": ["generator"]},
    "wbli": {
        "critic_loss": ["critic"],
        "gradient_penalty": ["critic"],
        "generator_encoder_loss": ["generator", "encoder"],
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
    return each_case([(name, shape) for name in names for shape in (GREY, POINTS)])


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def gradients(net):
    return [weight.grad for weight in net.parameters()]


def forget(run):
    for draws in run.draws.values():
        draws.clear()


# The updates: order, separation, clipping


@each_case(CASES)
@pytest.mark.parametrize("critic_steps", [1, 3])
def test_number_and_order_of_updates(model, shape, flags, critic_steps, start):
    """The critic first; every update has an x and a z of its own, of the full batch size."""
    name = model.__name__
    run = start(model, shape, *flags, "--critic-steps", critic_steps)
    forget(run)
    for _ in range(4):
        run.iteration()
    assert [updated for updated, *_ in run.updates] == 4 * (critic_steps * [CRITIC[name]] + OTHERS[name])
    assert len(run.draws["z"]) == 4 * (critic_steps + 1)
    assert len(run.draws["x"]) == 4 * (critic_steps + (name in JOINT))
    for batches in run.draws.values():
        assert {len(batch) for batch in batches} == {run.config.batch_size}
        assert len({tuple(batch.flatten().tolist()) for batch in batches}) == len(batches)


@each_case(CASES)
def test_an_update_leaves_the_other_networks_alone(model, shape, flags, start):
    """Their weights, but for the clip right after the critic's update, and their gradients, if any."""
    run = start(model, shape, *flags, "--critic-steps", 2)
    assert set(run.optimizers) == set(run.nets)
    for name, net in run.nets.items():
        optimised = [weight for group in run.optimizers[name].param_groups for weight in group["params"]]
        assert [id(weight) for weight in optimised] == [id(weight) for weight in net.parameters()]
        assert gradients(net) == [None] * len(optimised)

    state, last, together = run.initial, None, set(OTHERS[model.__name__])  # these have one loss
    for _ in range(2):
        run.iteration()
    for updated, before, after in run.updates:
        assert all(grad is not None for grad in before[updated][1])
        for name in run.nets:
            clipped = "clip" in vars(run.config) and name == last == CRITIC[model.__name__]
            assert clipped or equal(before[name][0], state[name][0])
            assert equal(after[name][0], before[name][0]) == (name != updated)
            if name != updated and not {name, updated} <= together:
                for grad, old in zip(before[name][1], state[name][1], strict=True):
                    assert grad is None or (old is not None and torch.equal(grad, old))
        state, last = after, updated


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
        for name in OTHERS[model.__name__]:
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
    joint, penalised = model.__name__ in JOINT, hasattr(model, "gradient_penalty") and "clip" not in flags
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


@pytest.mark.parametrize("term", [(name, term) for name in TERMS for term in TERMS[name]], ids="-".join)
@pytest.mark.parametrize("shape", [GREY, POINTS], ids=["images", "points"])
def test_each_term_moves_its_networks_and_no_others(term, shape, start, monkeypatch):
    name, function = term
    model = __import__(name)

    def zero(*arguments):
        return 0 * sum(part.mean() for part in arguments if isinstance(part, torch.Tensor))

    for other in TERMS[name].keys() - {function}:
        monkeypatch.setattr(model, other, zero)
    run = start(model, shape, *wide(model))
    run.iteration()
    moved = [name for name, net in run.nets.items() if not equal(net.parameters(), run.initial[name][0])]
    assert moved == TERMS[name][function]


@each(JOINT)
@pytest.mark.parametrize("half, reached", [(0, "encoder"), (1, "generator")])
def test_each_half_of_a_joint_loss_reaches_one(model, shape, flags, half, reached, start, monkeypatch):
    """F(x, E(x)) alone teaches E, F(G(z), z) alone teaches G."""
    both = model.generator_encoder_loss

    def one(*scores):
        return both(*(part if i == half else part.detach() for i, part in enumerate(scores)))

    monkeypatch.setattr(model, "generator_encoder_loss", one)
    run = start(model, shape, *flags)
    run.iteration()
    for name in ("encoder", "generator"):
        assert equal(run.nets[name].parameters(), run.initial[name][0]) == (name != reached)


@each(JOINT)
@pytest.mark.parametrize("more", [[], ["--constraint", "clip"]], ids=["gp", "clip"])
def test_a_constant_critic_teaches_nothing(model, shape, flags, more, start):
    """No reconstruction term: all that generator and encoder learn comes through the critic."""
    run = start(model, shape, *flags, *more)

    def flatten(*_):
        for weight in run.nets["critic"].parameters():
            weight.data.zero_()

    run.optimizers["critic"].register_step_post_hook(flatten)
    run.iteration()
    for name in ("generator", "encoder"):
        (before,) = (before for updated, before, _ in run.updates if updated == name)
        assert all((grad == 0).all() for grad in before[name][1])
        assert equal(run.nets[name].parameters(), run.initial[name][0])


@each([name for name in TERMS if "gradient_penalty" in TERMS[name]])
def test_gp_weight_is_a_factor(model, shape, flags, start):
    """The critic's first gradient is linear in λ."""
    x_train, first = start(model, shape).x_train, []
    for weight in (1e-9, 1, 3):
        run = start(model, shape, "--gp-weight", weight, "--critic-steps", 1, x_train=x_train)
        run.iteration()
        first.append(torch.cat([grad.flatten() for grad in run.updates[0][1]["critic"][1]]))
    assert (first[1] - first[0]).norm() > 1e-2
    assert_close(first[2] - first[0], 3 * (first[1] - first[0]), rtol=1e-3, atol=1e-5)


# iteration() and pictures(z)


@each_case(CASES + NO_CRITIC)
def test_iteration_returns_numbers_without_a_past(model, shape, flags, start):
    run = start(model, shape, *flags)
    assert not inspect.signature(run.iteration).parameters
    found = [run.iteration() for _ in range(3)]
    assert found[0] and all(list(metrics) == list(found[0]) for metrics in found)
    for metrics in found:
        for value in metrics.values():
            assert isinstance(value, torch.Tensor) and value.shape == () and value.isfinite()
            assert not value.requires_grad and value.grad_fn is None
    assert len({tuple(value.item() for value in metrics.values()) for metrics in found}) == 3


@each_case([(name, shape) for name in CRITIC for shape in (GREY, POINTS)] + NO_CRITIC)
@pytest.mark.parametrize("items", [1, 3])
def test_fewer_items_than_a_batch_holds(model, shape, flags, items, start):
    x_train = start(model, shape, *flags).x_train[:items]
    run = start(model, shape, *flags, "--batch-size", 16, x_train=x_train)
    forget(run)
    for _ in range(2):
        assert all(value.isfinite() for value in run.iteration().values())
    assert {len(batch) for batches in run.draws.values() for batch in batches} == {16}


@each_case(
    [
        (name, [channels, size, size], "--network", network)
        for name in CRITIC
        for channels in (1, 3)
        for size in (32, 64)
        for network in ("conv", "mlp")
    ]
)
def test_every_size(model, shape, flags, start):
    run = start(model, shape, *flags, "--batch-size", 2, "--critic-steps", 1)
    for _ in range(2):
        assert all(value.isfinite() for value in run.iteration().values())


@each_case(CASES + NO_CRITIC)
def test_the_seed_fixes_training(model, shape, flags, start):
    found = []
    for state, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(state)
        x = torch.arange(40 * math.prod(shape)).view(40, *shape) * 37 % 256
        x = x.float() / 255 if shape == POINTS else x.byte()
        run = start(model, shape, *flags, "--seed", seed, x_train=x)
        for _ in range(2):
            run.iteration()
        found.append([weight for net in run.nets.values() for weight in net.parameters()])
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


@each_case(CASES + NO_CRITIC)
@pytest.mark.parametrize("n", [16, 30])
def test_pictures_change_nothing(model, shape, flags, n, start):
    """Called as run() does: in eval mode. Neither weights nor statistics nor random numbers move."""
    run = start(model, shape, *flags)
    run.iteration()
    before = {name: value.clone() for name, value in run.nets.state_dict().items()}
    z, rng = torch.randn(n, run.config.z_dim), torch.get_rng_state()
    run.nets.eval()
    with torch.no_grad():
        pictures, again = run.pictures(z), run.pictures(z)
    after = run.nets.state_dict()
    assert list(after) == list(before) and equal(after.values(), before.values())
    assert torch.equal(torch.get_rng_state(), rng)

    with torch.no_grad():
        assert_close(pictures["samples"][0], model.generate(run.nets, z))
    assert pictures["samples"][0].shape == (n, *shape)
    assert list(again) == list(pictures)
    assert equal([x for x, _ in again.values()], [x for x, _ in pictures.values()])
    assert all(columns > 0 for _, columns in pictures.values())
    assert ("reconstructions" in pictures) == ("encoder" in run.nets)
    if "encoder" in run.nets:  # pairs, as many as there are test images, half as many as z at most
        x = as_float(run.x_test[: n // 2])
        with torch.no_grad():
            x_rec = model.generate(run.nets, model.encode(run.nets, x))
        assert_close(pictures["reconstructions"][0], torch.stack([x, x_rec], dim=1))


# Optimisers and settings


def settings(optimizer):
    (group,) = optimizer.param_groups
    chosen = {"lr", "alpha", "momentum", "centered", "betas", "weight_decay", "amsgrad", "eps"} & set(group)
    return type(optimizer).__name__, {key: group[key] for key in chosen} | {"lr": float(group["lr"])}


RMSPROP = "RMSprop", {"alpha": 0.99, "momentum": 0, "centered": False, "weight_decay": 0, "eps": 1e-8}


def adam(*betas):
    return "Adam", {"betas": betas, "weight_decay": 0, "amsgrad": False, "eps": 1e-8}


@pytest.mark.parametrize(
    "model, flags, optimizer, lr",
    [
        ("dcgan", [], adam(0.5, 0.999), 2e-4),
        ("wgan", [], RMSPROP, 5e-5),
        ("wgan", ["--lr", 3e-4], RMSPROP, 3e-4),
        ("wgan_gp", [], adam(0.5, 0.9), None),
        ("wgan_gp", ["--lr", 3e-4], adam(0.5, 0.9), 3e-4),
        ("wbli", [], adam(0.5, 0.9), None),
        ("wbli", ["--lr", 3e-4], adam(0.5, 0.9), 3e-4),
        ("wbli", ["--constraint", "clip"], RMSPROP, 5e-5),
        ("wbli", ["--constraint", "clip", "--lr", 3e-4], RMSPROP, 3e-4),
        ("gm_wae", SHORT, adam(0.5, 0.999), 5e-4),
        ("gm_wae", ["--lr", 3e-4, *SHORT], adam(0.5, 0.999), 3e-4),
    ],
    indirect=["model"],
)
def test_optimizers(model, flags, optimizer, lr, start):
    for shape in (GREY, POINTS):
        run = start(model, shape, *flags)
        kind, expected = optimizer
        for found in run.optimizers.values():
            assert settings(found) == (kind, expected | {"lr": run.config.lr})
        assert lr is None or run.config.lr == lr

        run.iteration()
        factor = {"RMSprop": (1 - 0.99) ** 0.5, "Adam": 1}[kind]  # of |g|, in the first step of each
        firsts = {update[0]: update for update in reversed(run.updates)}
        assert firsts.keys() == run.nets.keys()
        for name, before, after in firsts.values():
            for weight, grad, moved in zip(*before[name], after[name][0], strict=True):
                wanted = weight - run.config.lr * grad / (factor * grad.abs() + 1e-8)
                assert_close(moved, wanted, atol=run.config.lr / 100, rtol=0)


@pytest.mark.parametrize("model", ["wgan", "wbli"], indirect=True)
def test_clip_is_the_papers_unless_given(model, configure):
    constraint = ["--constraint", "clip"] * (model.__name__ == "wbli")
    assert configure(model, GREY, *constraint).clip == 0.01
    assert configure(model, GREY, *constraint, "--clip", 0.2).clip == 0.2


@pytest.mark.parametrize("model", CRITIC, indirect=True)
@pytest.mark.parametrize("shape", [GREY, POINTS], ids=["images", "points"])
def test_a_whole_run(model, shape, configure, tmp_path):
    config = configure(model, shape, "--steps", 2, "--log-every", 1)
    many = (20, *shape)
    x = torch.randn(many) if shape == POINTS else torch.randint(256, many, dtype=torch.uint8)
    model.train(config, x, x[:5])
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2"]
    assert (tmp_path / "run" / "samples" / "0000002.png").is_file()


# Learning, on two-dimensional toys


@pytest.mark.parametrize("model", ["wgan"], indirect=True)
def test_wgan_learns_a_gaussian(model, start):
    """Data N(3, 1): pushed the wrong way, the samples run off to infinity or stay at 0."""
    x = torch.randn(2000, 2) + 3
    run = start(model, POINTS, "--batch-size", 128, "--lr", 5e-4, "--clip", 0.1, x_train=x)
    x_fake = []
    for step in range(200):
        run.iteration()
        if step >= 160:  # it swings about its end
            with torch.no_grad():
                x_fake.append(model.generate(run.nets, model.draw_z(500, run.config, "cpu")))
    x_fake = torch.cat(x_fake)
    assert_close(x_fake.mean(0), torch.full((2,), 3.0), atol=1, rtol=0)
    assert_close(x_fake.std(0), torch.ones(2), atol=0.75, rtol=0)


@pytest.mark.parametrize("model", ["wbli"], indirect=True)
def test_wbli_learns_a_gaussian_in_both_directions(model, start):
    """Samples like the data, and G(E(x)) near x, though no term asks for it."""
    mean, std = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.5])
    x = mean + std * torch.randn(2000, 2)
    flags = ["--z-dim", 2, "--batch-size", 128, "--lr", 2e-3, "--gp-weight", 1]
    run = start(model, POINTS, *flags, x_train=x)
    w = torch.stack([run.iteration()["W"] for _ in range(150)])
    assert w[-20:].mean() < 0.7 * w[:20].mean()
    with torch.no_grad():
        x_fake = model.generate(run.nets, model.draw_z(2000, run.config, "cpu"))
        x_rec = model.generate(run.nets, model.encode(run.nets, x))
    assert_close(x_fake.mean(0), mean, atol=0.5, rtol=0)
    assert_close(x_fake.std(0), std, atol=0.35, rtol=0)
    error, of_chance = (x_rec - x).norm(dim=1).mean(), (x_rec - x.roll(1, 0)).norm(dim=1).mean()
    assert error < 0.6 * of_chance  # a quarter to a third, typically
