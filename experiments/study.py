"""python -m experiments.study [points|stacked|digits|colors …]: models against each other, seed by seed.

    points   WBLI, BiGAN and WGAN-GP on the grid of 25 Gaussians
    stacked  the same three on stacked MNIST with its 1 000 modes, at six learning rates
    digits   WBLI and BiGAN on MNIST
    colors   α-GAN, DCGAN, WGAN-GP and AGE on color_mnist, at four learning rates

Each model has its own networks and, unless rates are named, its own settings; all models of a study train
for about the same time on a CPU. Every training is a run of the model file, with the norms of the gradients
of generator and encoder as two more columns of metrics.csv; the same command goes on with what was stopped.
Prints the table of tools.evaluate, each model's spread over its runs and over its seeds, how much the
independent critic itself varies, and the gradients along the runs; draws study-<name>.png.
"""

import sys
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev

from tools import tables
from tools.flags import Parser, whole


@dataclass(frozen=True)
class Study:
    """Runs of models {name: steps}, with these flags, at each of the rates, with each of the seeds.

    rates: None is the model's own. stages: of tools.evaluate; n: samples. own: {name: flags of its own}.
    falling: the rate falls to a hundredth over the second half, so that a run cannot go on for longer.
    """

    models: dict
    flags: list
    stages: list
    n: int
    rates: tuple = (None,)
    seeds: int = 3
    own: dict = field(default_factory=dict)
    falling: bool = False

    def runs(self, steps=None):
        """{the run's name: (model, flags)}; `steps` in place of each model's own."""
        found = {}
        for model, lr, seed in product(self.models, self.rates, range(self.seeds)):
            rate = [] if lr is None else ["--lr", f"{lr:g}"]
            last = steps or self.models[model]
            flags = [*self.flags, *self.own.get(model, []), *rate, "--seed", str(seed)]
            flags += ["--steps", str(last)]
            if self.falling:
                flags += ["--decay-start", str(last // 2), "--decay-end", str(last)]
            found["-".join([model, *rate[1:], str(seed)])] = model, flags
        return found


OFTEN = ["--width", "16", "--log-every", "10", "--save-every", "100"]
GRID = ["--dataset", "grid", *OFTEN]
STACKED = ["--dataset", "stacked_mnist", *OFTEN]
DIGITS = ["--dataset", "mnist", *OFTEN]
COLORS = ["--dataset", "color_mnist", *OFTEN]
OWN_ON_POINTS = {  # the best of four settings each
    "wbli": ["--lr", "2e-3"],
    "bigan": ["--lr", "1e-3"],
    "wgan_gp": ["--lr", "2e-3", "--critic-steps", "2"],
}
OWN_ON_PICTURES = {  # those of commands.txt, chosen on MNIST
    "wbli": ["--batch-size", "32", "--critic-steps", "2"],
    "bigan": ["--network", "mlp", "--width", "32"],  # its paper's; its conv networks collapse
    "wgan_gp": ["--batch-size", "32", "--critic-steps", "3", "--gp-weight", "1", "--lr", "1e-3"],
    "alpha_gan": ["--batch-size", "32"],
    "dcgan": ["--batch-size", "32"],
    "age": ["--z-dim", "16"],
}
ON_POINTS = {"wbli": 5500, "bigan": 18_000, "wgan_gp": 16_000}  # in some four minutes each, on one core
ON_STACKED = {"wbli": 1400, "bigan": 1800, "wgan_gp": 1400}  # in some two and a half minutes
ON_DIGITS = {"wbli": 2300, "bigan": 5600}
ON_COLORS = {"alpha_gan": 1200, "dcgan": 3000, "wgan_gp": 1000, "age": 1050}  # in some 80 seconds
RATES = (2e-4, 5e-4, 1e-3, 2e-3)
MORE_RATES = (*RATES, 4e-3, 8e-3)
CODES = ["classifier scores", "reconstruction", "representation"]
SAMPLES = ["classifier scores", "diversity", "independent critic"]
STUDIES = {
    "points": Study(ON_POINTS, GRID, ["modes", "reconstruction"], 2500, own=OWN_ON_POINTS, falling=True),
    "stacked": Study(
        ON_STACKED, STACKED, ["classifier scores"], 26_000, MORE_RATES, own=OWN_ON_PICTURES, falling=True
    ),
    "digits": Study(ON_DIGITS, DIGITS, CODES, 10_000, own=OWN_ON_PICTURES, falling=True),
    "colors": Study(ON_COLORS, COLORS, SAMPLES, 10_000, RATES, own=OWN_ON_PICTURES, falling=True),
}

# Results; done is [(run, its evaluation)]


def by_model(done):
    """{model: [(run, its evaluation)]}, in the order given."""
    names = dict.fromkeys(run.name for run, _ in done)
    return {name: [pair for pair in done if pair[0].name == name] for name in names}


def compared(done):
    """(measures of which there is a best, their titles), in the order of the table of tools.evaluate."""
    real, dataset = done[0][1]["references"].get("real data", {}), done[0][1]["dataset"]
    used = {name for _, result in done for name in result["metrics"]}
    names = [name for name in tables.METRICS if name in used and tables.METRICS[name].best]
    names = [name for name in names if tables.METRICS[name].best != "data" or name in real]
    return names, [tables.title(name, dataset) for name in names]


def spread(done, diverged=()):
    """For each model what the best, the median and the worst of its runs have of each measure.

    A run that diverged, whose path is among those, has no place in it: only that it did is counted.
    """
    real = done[0][1]["references"].get("real data", {})
    names, titles = compared(done)
    rows = [["best / median / worst", "runs", *titles]]
    for model, pairs in by_model(done).items():
        ended = [result["metrics"] for run, result in pairs if run.path not in diverged]
        rows.append([model, f"{len(ended)} of {len(pairs)}"])
        for name in names:
            found = [measured[name] for measured in ended if name in measured]
            found.sort(key=partial(tables.cost, name, real=real.get(name)))
            shown = [found[i] for i in (0, (len(found) - 1) // 2, -1)] if found else []
            rows[-1].append(" / ".join(format(value, tables.METRICS[name].form) for value in shown) or "–")
    return rows


def over_seeds(done, diverged=()):
    """For each model and rate the mean ± standard deviation over its seeds; without what diverged."""
    (names, titles), groups = compared(done), defaultdict(list)
    for run, result in done:
        if run.path not in diverged:
            groups[f"{run.name}, learning rate {run.config.lr:g}"].append(result["metrics"])
    rows = [["mean ± standard deviation", "runs", *titles]]
    for title, ended in groups.items():
        rows.append([title, str(len(ended))])
        for name in names:
            found = [measured[name] for measured in ended if name in measured]
            numbers = [mean(found)] if found else []
            numbers += [stdev(found)] if len(found) > 1 else []
            rows[-1].append(" ± ".join(format(x, tables.METRICS[name].form) for x in numbers) or "–")
    return rows


def critic_rows(done, data, seeds=3):
    """For each model's best run W of as many independent critics, each on samples of its own.

    Their standard deviation is what the measure itself varies by.
    """
    from tools.evaluation import Subject, critic
    from tools.runs import draw_z, samples, seeded

    rows = [["W of independent critics", "run", *map(str, range(seeds)), "standard deviation"]]
    for model, pairs in by_model(done).items():
        pairs = [pair for pair in pairs if "critic" in pair[1]["metrics"]]
        if not pairs:
            continue
        (run, _), values = min(pairs, key=lambda pair: pair[1]["metrics"]["critic"]), []
        for seed in range(seeds):
            x = samples(run, draw_z(run, data.options.n, seed), data.options.batch_size)
            with seeded(seed):
                values.append(critic(Subject(run, x), data)["critic"])
        rows.append([model, run.path.name, *(f"{value:.3f}" for value in (*values, stdev(values)))])
    return rows


def gradients(run):
    """(steps (R,), {network: norms of its gradient (R,)}) of the R rows that the run has logged."""
    from tools.report import read_metrics

    columns = read_metrics(run.path)
    logged = [name for name in columns if name.startswith("gradient of ") and len(columns[name])]
    return columns.get("step"), {name.split()[-1]: columns[name] for name in logged}


def gradient_rows(done):
    """For each network and rate the norms over the seeds: medians of two tenths, the least, the greatest."""
    rows, found = [["gradient of", "first tenth", "last tenth", "least", "greatest"]], defaultdict(list)
    for run, _ in done:
        for name, norms in gradients(run)[1].items():
            found[f"{name}, {run.name}, learning rate {run.config.lr:g}"].append(norms)
    for title, seeds in found.items():
        first = mean(median(norms[: max(1, len(norms) // 10)]) for norms in seeds)
        last = mean(median(norms[-max(1, len(norms) // 10) :]) for norms in seeds)
        ends = min(norms.min() for norms in seeds), max(norms.max() for norms in seeds)
        rows.append([title, *(f"{size:.3g}" for size in (first, last, *ends))])
    return rows


def draw(done, path):
    """A panel a model, on one scale: filtered norms along its runs, a colour for each learning rate."""
    from tools import figures

    groups, labels = by_model(done), {}
    rates = sorted({run.config.lr for run, _ in done})
    figure, panels = figures.axes(1, len(groups))
    for panel, (model, pairs) in zip(panels, groups.items(), strict=True):
        if panel is not panels[0]:
            panel.sharey(panels[0])
        for run, _ in pairs:
            steps, norms_of = gradients(run)
            for name, norms in norms_of.items():
                style = {"color": f"C{rates.index(run.config.lr)}", "linewidth": 1}
                style["linestyle"] = "-" if name == "generator" else "--"
                (line,) = panel.plot(steps, figures.filtered(norms), **style)
                labels.setdefault(f"{name}, rate {run.config.lr:g}", line)
        panel.set(xlabel="step", yscale="log", title=f"{model}: norms of the gradients")
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=len(rates))
    figures.save(figure, path)


# The command


def check(study, name, options, complain):
    """Train and evaluate, print the tables and draw; complain(message) of what fails."""
    from experiments.training import train
    from tools import evaluation

    folder, runs = Path(options.out) / name, study.runs(options.steps)
    shared, diverged = ["--data-dir", options.data_dir, "--device", options.device.type], []
    for i, (title, (model, flags)) in enumerate(runs.items(), 1):
        print(f"{name}, run {i} of {len(runs)}: {title}", file=sys.stderr)
        if not train(model, [*flags, *shared], folder / title, with_gradients=True):
            diverged.append(folder / title)
            complain(f"{folder / title} diverged; evaluated is what it saved last")
    measured = Namespace(n=options.n or study.n, seed=0, batch_size=250, stages=study.stages, split="test")
    measured.data_dir, measured.device = options.data_dir, options.device
    measured.runs = [folder / title for title in runs]
    opened = [run for group in evaluation.opened(measured, complain).values() for run in group]
    data, done = evaluation.evaluate_group(opened, measured, complain) if opened else (None, [])
    if done:
        path = Path(options.out) / f"study-{name}.png"
        print(f"{name}, {path}", tables.text(done), sep="\n\n", flush=True)
        print(tables.aligned(spread(done, diverged)), end="\n\n")
        print(tables.aligned(over_seeds(done, diverged)), end="\n\n")
        if "independent critic" in study.stages:
            print(tables.aligned(critic_rows(done, data)), end="\n\n")
        print(tables.aligned(gradient_rows(done)), end="\n\n")
        draw(done, path)


def main(argv=None):
    """Train, evaluate and print as the flags say; 2 if something failed."""
    parser = Parser("experiments.study", __doc__.split("\n")[0])
    flag = parser.add_argument
    flag("studies", nargs="*", help=f"of {', '.join(STUDIES)}; all unless given")
    flag("--steps", type=whole(1), help="of each training, in place of its own number")
    flag("--n", type=whole(2), help="samples to evaluate, in place of the study's own number")
    flag("--out", default="study", help="folder for runs and figures")
    parser.add_places()
    options = parser.parse_args(argv)
    chosen = parser.known(options.studies, STUDIES, "study")
    parser.needs("matplotlib", "scipy", "sklearn", "torchmetrics")
    with parser.mistakes():
        for name in chosen:
            check(STUDIES[name], name, options, parser.complain)

    parser.sign(options.device)
    if parser.failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
