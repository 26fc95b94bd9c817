"""python -m experiments.along [MODEL …]: how FID falls along runs, and whether what is logged follows it.

Figures 3 and 4 of WGAN: does W tell the quality of samples, and JS not? Each run is trained in chunks; each
leaves a checkpoint, whose samples are measured. The answer is Spearman's correlation of FID and the logged
estimate, over the whole run and over its second half, there with the linear trend of each removed, as two
numbers that only fall are correlated without a reason. Draws along.png.
"""

import shlex
from argparse import Namespace
from pathlib import Path

from tools.flags import Parser, whole
from tools.sync import MODELS
from tools.tables import aligned, title

ESTIMATES = ("W", "JS")  # columns of metrics.csv


def measured(checkpoints, path, options):
    """{"step", "fid" and, if logged, "W" or "JS": a list, a number for each checkpoint} of the run in `path`.

    checkpoints: (step, folder). FID is that of tools.evaluate with options.n samples, seed 0; the estimate is
    that of metrics.csv at the step, filtered by a running median.
    """
    import numpy as np

    from tools import figures, metrics
    from tools.evaluation import Data
    from tools.report import read_metrics
    from tools.runs import draw_z, open_run, samples

    found, data = {"step": [], "fid": []}, None
    asked = Namespace(**vars(options), split="test", stages=[], batch_size=250, seed=0)
    for step, kept in checkpoints:
        run = open_run(kept, options.device)
        data = data or Data(run, asked)
        if data.classifier is None:
            raise ValueError(f"{data.name} has no labels, so there is no classifier for FID")
        features = data.features(samples(run, draw_z(run, options.n, seed=0), asked.batch_size))
        found["step"].append(step)
        found["fid"].append(metrics.frechet_distance(data.train_features, features))
    logged = read_metrics(path)
    for estimate in logged.keys() & set(ESTIMATES):
        values = np.interp(found["step"], logged["step"], figures.filtered(logged[estimate]))
        found[estimate] = values.tolist()
    return found


def correlations(a, b):
    """Spearman's, over the whole of both, and over their second halves without their linear trends."""
    from scipy.signal import detrend
    from scipy.stats import spearmanr

    half = len(a) // 2
    whole = spearmanr(a, b)
    second_half = spearmanr(detrend(a[half:]), detrend(b[half:]))
    return float(whole[0]), float(second_half[0])


def draw(found_of, fid, path):
    """A panel a run: FID over steps and, on an axis of its own, what was logged; axes name the colours."""
    from tools import figures

    figure, panels = figures.panels_of(len(found_of))
    for panel, (run, found) in zip(panels, found_of.items(), strict=True):
        panel.plot(found["step"], found["fid"], "o-", color="C0")
        panel.set(title=run, xlabel="step")
        panel.set_ylabel(fid, color="C0")
        for name in found.keys() & set(ESTIMATES):
            other = panel.twinx()
            other.plot(found["step"], found[name], "s--", color="C1")
            other.set_ylabel(name, color="C1")
    figures.save(figure, path)


def main(argv=None):
    """Train, measure, print and draw as the flags say."""
    parser = Parser("experiments.along", __doc__.split("\n")[0])
    flag = parser.add_argument
    flag("models", nargs="*", default=["wgan", "dcgan"], help="names of model files")
    flag("--dataset", default="mnist", help="with labels, for the classifier whose features FID compares")
    flag("--steps", type=whole(1), default=2000, help="of each run")
    flag("--every", type=whole(1), default=50, help="steps between checkpoints")
    flag("--seeds", type=whole(1), default=3, help="runs of each model")
    flag("--flags", type=shlex.split, default="--width 16", help="more flags of the model files")
    flag("--n", type=whole(100), default=2000, help="samples of each checkpoint")
    flag("--out", type=Path, default="along", help="folder for runs and the figure")
    parser.add_places()
    options = parser.parse_args(argv)
    models = parser.known(options.models, MODELS, "model")
    parser.needs("matplotlib", "scipy", "torchmetrics")
    if options.steps < 6 * options.every:
        parser.error("--every: a correlation takes six checkpoints, better forty")

    from experiments.training import chunks

    places = ["--data-dir", options.data_dir, "--device", options.device.type]
    head = ["run", "checkpoints", f"{title('fid', options.dataset)}, last", "logged"]
    rows = [[*head, "correlation over the run", "of its second half, trend removed"]]
    found_of = {}
    with parser.mistakes():
        for name in models:
            for seed in range(options.seeds):
                run = f"{name}-{seed}"
                flags = ["--dataset", options.dataset, "--seed", str(seed), *options.flags, *places]
                pieces = chunks(name, flags, options.out / run, options.steps, options.every)
                found = found_of[run] = measured(pieces, options.out / run, options)
                estimate = next(iter(found.keys() & set(ESTIMATES)), None)
                numbers = ["–", "–"]
                if estimate:
                    numbers = [f"{number:.2f}" for number in correlations(found["fid"], found[estimate])]
                last = f"{found['fid'][-1]:.2f}"
                rows.append([run, str(len(found["step"])), last, estimate or "–", *numbers])
        draw(found_of, title("fid", options.dataset), options.out / "along.png")
    print(aligned(rows))
    parser.sign(options.device)


if __name__ == "__main__":
    main()
