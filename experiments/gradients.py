"""python -m experiments.gradients: do gradients vanish or explode under an optimal critic?

WBLI's abstract claims that they do neither. On the grid of 25 Gaussians, at five learning rates, runs of
WBLI, BiGAN and DCGAN leave checkpoints. At each of them generator and encoder are held, the critic is trained
on, and each of many fake points x = G(z) has the gradient of the generator's loss taken by x itself. The size
at a checkpoint is the median of the norms. A loss keeps its gradients if the sizes of all checkpoints and
rates are within a factor of 100 of each other.
"""

from math import inf
from pathlib import Path

from tools.flags import Parser, whole
from tools.tables import aligned

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
STEPS = {"wbli": 600, "bigan": 3000, "dcgan": 3000}  # about the same time on a CPU
FLAGS = ["--dataset", "grid", "--width", "16", "--seed", "0"]
LIMIT = 100  # greatest by least size


def generator_losses(name):
    """{what the generator minimises: its loss for each score (N,)}."""
    from torch.nn.functional import softplus

    if name == "wbli":
        return {"−F": lambda f: -f}
    return {"log(1 − D)": lambda d: -softplus(d), "−log D": lambda d: softplus(-d)}


def train_critic(run, x_train, steps):
    """Adam with a rate that falls to 0, generator and encoder held; → score(x, z) of the trained network."""
    import torch

    import bigan
    import wbli
    from common import sample_batch

    joint, config, nets = run.name != "dcgan", run.config, run.nets
    critic = nets["critic" if run.name == "wbli" else "discriminator"].train()

    def score(x, z):
        return critic(x, z) if joint else critic(x)

    optimizer = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(steps):
        x = sample_batch(x_train, config.batch_size)
        z = run.model.draw_z(len(x), config, x.device)
        with torch.no_grad():
            x_fake = run.model.generate(nets, z)
            z_hat = run.model.encode(nets, x) if joint else z
        real, fake = score(x, z_hat), score(x_fake, z)
        if run.name == "wbli":
            penalty = wbli.gradient_penalty(critic, x, z_hat, x_fake, z)
            loss = wbli.critic_loss(real, fake) + config.gp_weight * penalty
        else:
            loss = bigan.discriminator_loss(real, fake)  # dcgan's is the same
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return score


def sizes(run, score, n):
    """{what the generator minimises: median over n fakes of the norm of ∂loss/∂x}; score(x, z) → (n,)."""
    import torch

    z = run.model.draw_z(n, run.config, torch.device("cpu"))
    x = run.model.generate(run.nets, z).detach().requires_grad_()
    found = {}
    for name, loss in generator_losses(run.name).items():
        (gradient,) = torch.autograd.grad(loss(score(x, z)).sum(), x)
        found[name] = gradient.flatten(1).norm(dim=1).median().item()
    return found


def sizes_along(pieces, x_train, options):
    """(step, sizes()) for each (step, folder of a checkpoint), under a critic that is trained on there."""
    from tools.runs import open_run, seeded

    for step, kept in pieces:
        run = open_run(kept, "cpu")
        with seeded(0):
            score = train_critic(run, x_train, options.optimal)
            found = sizes(run, score, options.n)
        yield step, found


def verdict(values):
    """Whether all are within a factor of LIMIT; a size of 0 has vanished, one of inf exploded."""
    return "yes" if 0 < max(values) <= LIMIT * min(values) < inf else "no"


def draw(found, path):
    """A panel a loss, on one scale: sizes along the runs, a line for each learning rate.

    found: {loss: {rate: ([steps], [sizes])}}.
    """
    from tools import figures

    figure, panels = figures.panels_of(len(found), height=3)
    for panel, (name, curves) in zip(panels, found.items(), strict=True):
        if panel is not panels[0]:
            panel.sharey(panels[0])
        for rate, (steps, values) in curves.items():
            panel.plot(steps, values, ".-", label=f"learning rate {rate:g}")
        panel.set(xlabel="step", yscale="log", title=f"{name}: median ‖∂loss/∂x‖")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(RATES))
    figures.save(figure, path)


def main(argv=None):
    """Train, measure, print and draw as the flags say."""
    parser = Parser("experiments.gradients", __doc__.split("\n")[0])
    flag = parser.add_argument
    flag("models", nargs="*", help=f"of {', '.join(STEPS)}; all unless given")
    flag("--steps", type=whole(6), help="of each run, in place of its own number")
    flag("--optimal", type=whole(1), default=500, help="steps of the critic at each checkpoint")
    flag("--n", type=whole(2), default=2500, help="fakes whose gradients are taken")
    flag("--out", type=Path, default="gradients", help="folder for runs and the figure")
    parser.set_defaults(device="cpu")
    options = parser.parse_args(argv)
    chosen = parser.known(options.models, STEPS, "model")
    parser.needs("matplotlib")

    from common import load_data
    from experiments.training import Diverged, chunks

    found = {}
    with parser.mistakes():
        x_train, _ = load_data("grid", "data", "train", 32, "cpu")
        for name in chosen:
            steps, losses = options.steps or STEPS[name], [*generator_losses(name)]
            curves = {loss: {rate: ([], []) for rate in RATES} for loss in losses}
            found |= {f"{name}, {loss}": curves[loss] for loss in losses}
            for rate in RATES:
                flags = [*FLAGS, "--lr", f"{rate:g}", "--device", "cpu"]
                pieces = chunks(name, flags, options.out / f"{name}-{rate:g}", steps, steps // 6)
                try:
                    for step, measured in sizes_along(pieces, x_train, options):
                        for loss, size in measured.items():
                            curves[loss][rate][0].append(step)
                            curves[loss][rate][1].append(size)
                except Diverged as problem:
                    parser.complain(problem)
                    for loss in losses:
                        curves[loss][rate][0].append(steps)
                        curves[loss][rate][1].append(inf)
        draw(found, options.out / "claims-gradients.png")
    rows = [["loss of G", "least size", "greatest", "ratio", f"within {LIMIT}"]]
    for name, curves in found.items():
        values = [size for _, along in curves.values() for size in along]
        least, greatest = min(values), max(values)
        ratio = greatest / least if 0 < least < inf else inf
        rows.append([name, f"{least:.3g}", f"{greatest:.3g}", f"{ratio:.3g}", verdict(values)])
    print(aligned(rows))
    parser.sign(options.device)


if __name__ == "__main__":
    main()
