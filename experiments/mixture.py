"""python -m experiments.mixture RUN …: whether GM-WAE's codes lie on its prior.

The MMD between q(z) = E_x Σ_k q(k|x) q(z|k,x) on test items and the prior, with the networks in eval mode, as
they are used, and in training mode, as they are trained: there batch norm moves the codes of each batch to
where its own statistics are right. Beside it, as a scale, mixtures that miss the prior in known ways.
"""

from copy import deepcopy
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from tools.flags import Parser, whole
from tools.tables import aligned


def of_batches(distance, batches):
    """Mean of distance(i) over so many batches, and its standard error."""
    values = [distance(i).item() for i in range(batches)]
    return mean(values), stdev(values) / sqrt(batches)


def scale(means, std, n, batches):
    """{what the mixture is: (MMD from the prior, standard error)}, by draws of n items in each batch."""
    import torch

    from gm_wae import mmd

    components, d = means.shape

    def distance(lost, factor):
        weights = torch.full((n, components), 1 / (components - lost))
        weights[:, :lost] = 0
        z, z_p = (means + size * torch.randn(n, components, d) for size in (factor * std, std))
        return mmd(z, weights, z_p, torch.full((n, components), 1 / components))

    cases = {
        "the prior itself": (0, 1),
        "one component lost": (1, 1),
        "two components lost": (2, 1),
        "half the standard deviation": (0, 0.5),
    }
    return {name: of_batches(lambda _, case=case: distance(*case), batches) for name, case in cases.items()}


def of_codes(run, x, n, batches, training):
    """(MMD of q(z) from the prior, standard error) over batches of n items; x as load_data gives it.

    `training`: with each batch's own statistics in the batch norms; the run's networks stay as they are.
    """
    import torch

    from common import as_float
    from gm_wae import classify, component_codes, component_means, mmd

    means, nets = component_means(run.config), deepcopy(run.nets).train(training)

    @torch.no_grad()
    def distance(i):
        items = as_float(x[i * n : (i + 1) * n])
        q = classify(nets, items)
        mu, log_var = component_codes(nets, items)
        z = mu + (log_var / 2).exp() * torch.randn_like(mu)
        z_p = means + run.config.prior_std * torch.randn_like(z)
        return mmd(z, q, z_p, torch.full_like(q, 1 / q.shape[1]))

    return of_batches(distance, batches)


def main(argv=None):
    """Measure and print as the flags say."""
    parser = Parser("experiments.mixture", __doc__.split("\n")[0])
    flag = parser.add_argument
    flag("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run of gm_wae.py")
    flag("--n", type=whole(2), default=100, help="items in a batch; in training mode the run's own")
    flag("--batches", type=whole(2), default=40, help="how many are averaged")
    parser.add_data_dir()
    parser.set_defaults(device="cpu")
    options = parser.parse_args(argv)
    import torch

    from gm_wae import component_means
    from tools.runs import load_split, open_run, seeded

    rows = [["q(z)", "MMD from the prior", "standard error"]]
    with parser.mistakes():
        for path in options.runs:
            run = open_run(path, torch.device("cpu"))
            if run.name != "gm_wae":
                raise ValueError(f"{path} is a run of {run.name}.py: only gm_wae.py has a mixture")
            x, _ = load_split(run, "test", options.data_dir)
            if len(x) < options.n * options.batches:
                raise ValueError(f"--n {options.n} --batches {options.batches}: there are {len(x)} items")
            with seeded(0):
                x = x[torch.randperm(len(x))]  # as they lie, a batch is of few writers
                found = {}
                if len(rows) == 1:
                    prior = component_means(run.config), run.config.prior_std
                    found = scale(*prior, options.n, options.batches)
                found[f"{path}, eval mode"] = of_codes(run, x, options.n, options.batches, training=False)
                n = run.config.batch_size
                batches = min(options.batches, len(x) // n)
                found[f"{path}, training mode"] = of_codes(run, x, n, batches, training=True)
            rows += [[name, f"{value:.4f}", f"{error:.4f}"] for name, (value, error) in found.items()]
    print(aligned(rows))
    parser.sign(options.device)


if __name__ == "__main__":
    main()
