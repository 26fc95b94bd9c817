"""The figures of a report, each a function that writes one PNG file."""

from inspect import signature

import numpy as np
import torch

from tools.runs import codes, draw_z, in_batches, probabilities

WINDOW = 101  # rows of the WGAN paper's median filter
SCORES = ("critic", "discriminator")  # networks whose level sets are drawn, if they see x alone


def axes(rows=1, columns=1, width=4.5, height=3.5):
    """(figure, flat list of axes), without a window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def panels_of(n, height=3.5):
    """(figure, n axes) in rows of three."""
    columns = min(3, n)
    figure, panels = axes(-(-n // columns), columns, height=height)
    for panel in panels[n:]:
        panel.remove()
    return figure, panels[:n]


def save(figure, path):
    """As a PNG file."""
    figure.savefig(path, dpi=110)


def window(rows):
    """The filter's window: WINDOW rows or, so that a curve stays a curve, the odd number below a tenth."""
    return min(WINDOW, max(1, (rows // 10 - 1) | 1))


def filtered(values):
    """The running median of a column, as long as it; at its ends the first and last value are repeated."""
    from scipy.ndimage import median_filter

    return median_filter(values, size=window(len(values)), mode="nearest") if len(values) else values


def curves(columns_of, path):
    """A panel for each logged quantity, with a filtered curve for each run: {run: {quantity: array}}."""
    names = list(dict.fromkeys(name for columns in columns_of.values() for name in columns if name != "step"))
    figure, panels = panels_of(len(names))
    for name, panel in zip(names, panels, strict=True):
        for i, (label, columns) in enumerate(columns_of.items()):
            if name in columns:
                panel.plot(columns["step"], filtered(columns[name]), color=f"C{i % 10}", label=label)
        panel.set(title=name, xlabel="step")
        panel.legend(fontsize="x-small")
    save(figure, path)


def score_of(run):
    """The name of the run's network that scores x alone, or None."""
    for name in SCORES:
        if name in run.nets and len(signature(run.nets[name].forward).parameters) == 1:
            return name
    return None


def levels(run, x, fake, path, points=1000):
    """Level sets of the critic or discriminator over the plane, with real and generated points (N, 2)."""
    x, fake = x[:points].numpy(), fake[:points].numpy()
    limit = 1.15 * np.abs(x).max()
    line = torch.linspace(-limit, limit, 121)
    plane = torch.cartesian_prod(line, line)
    score = in_batches(run.nets[score_of(run)], plane, 5000, run.device).view(121, 121).T
    figure, (panel,) = axes(width=6, height=5)
    sets = panel.contour(line.numpy(), line.numpy(), score.numpy(), levels=25, linewidths=0.8)
    figure.colorbar(sets, label=f"score of the {score_of(run)}, high where it sees data", shrink=0.8)
    panel.scatter(*x.T, s=3, color="tab:orange", label="real")
    panel.scatter(*fake.T, s=3, color="tab:green", label="generated")
    panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=run.path.name)
    panel.legend(fontsize="x-small", loc="upper right")
    save(figure, path)


def ticks(classes):
    """The labels that an axis has room for."""
    return range(0, classes, max(1, classes // 10))


def heat_map(run, data, path):
    """The mean of classify() over the items of each label, a row."""
    q = probabilities(run, data.x_test)
    matrix = torch.stack([q[data.y_test == label].mean(0) for label in range(data.classes)]).nan_to_num()
    figure, (panel,) = axes(width=5, height=4.5)
    image = panel.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, label="mean probability")
    panel.set(xlabel="class, code or component", ylabel="label", title=run.path.name)
    panel.set(xticks=range(matrix.shape[1]), yticks=ticks(data.classes))
    save(figure, path)


def umap(run, data, n, path):
    """A map of E(x) for n test items, coloured by label, with n draws from the prior as circles."""
    x, y = data.x_test[:n], data.y_test[:n]
    z_hat = codes(run, x)
    z = draw_z(run, n, data.options.seed)
    plane = umap_plane(torch.cat([z_hat, z]), data.options.seed)
    figure, (panel,) = axes(width=6, height=5)
    colours = {"vmin": -0.5, "vmax": data.classes - 0.5, "cmap": "tab10" if data.classes <= 10 else "turbo"}
    dots = panel.scatter(*plane[: len(x)].T, s=6, c=y.numpy(), **colours)
    figure.colorbar(dots, label="label", ticks=ticks(data.classes))
    panel.plot(*plane[len(x) :].T, "ko", markersize=3, fillstyle="none", alpha=0.4, label="prior")
    panel.set(xticks=[], yticks=[], title=run.path.name)
    panel.legend(fontsize="x-small")
    save(figure, path)


def umap_plane(z, seed):
    """UMAP's map (N, 2) of codes (N, d)."""
    from umap import UMAP

    return UMAP(random_state=seed, n_jobs=1).fit_transform(z.numpy())
