"""What a run has left along its way: metrics.csv and snapshots."""

import csv
from dataclasses import replace

import numpy as np

from tools.runs import fresh_networks, load_tensors

WINDOW = 101  # rows of the WGAN paper's median filter


def read_metrics(path):
    """({column: float array}) of the run's metrics.csv, "step" first; {} if there is none to read."""
    file = path / "metrics.csv"
    if not file.exists():
        return {}
    try:
        rows = list(csv.reader(file.read_text(encoding="utf-8").splitlines()))
        table = np.array([[float(cell) for cell in row] for row in rows[1:]]).reshape(-1, len(rows[0]))
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    return dict(zip(rows[0], table.T, strict=True))


def window(rows):
    """The filter's window: WINDOW rows or, so that a curve stays a curve, the odd number below a tenth."""
    return min(WINDOW, max(1, (rows // 10 - 1) | 1))


def filtered(values):
    """The running median of a column, as long as it; at its ends the first and last value are repeated."""
    from scipy.ndimage import median_filter

    return median_filter(values, size=window(len(values)), mode="nearest") if len(values) else values


def estimate(path):
    """(name, steps, filtered values) of the W or JS that the run has logged, or None."""
    columns = read_metrics(path)
    for name in ("W", "JS"):
        if name in columns:
            return name, columns["step"], filtered(columns[name])
    return None


def along(run, quality):
    """{"along": …, "rank_correlation": …} of the run's snapshots; ValueError if there is too little.

    quality(run) measures a run; it gets this one with the generator of each snapshot. "along" has a list
    each of the steps, of that quality and, under its name, of the estimate; the correlation is Spearman's.
    """
    from scipy.stats import spearmanr

    files = sorted((run.path / "snapshots").glob("*.pt"))
    found = estimate(run.path)
    if not files or found is None or not len(found[1]):
        raise ValueError(f"{run.path} has no snapshots, or logs no W or JS to compare them with")
    name, steps, values = found
    points = {"step": [], "fid": [], name: []}
    for file in files:
        step, changed = open_snapshot(run, file)
        points["step"].append(step)
        points["fid"].append(quality(changed))
        points[name].append(float(np.interp(step, steps, values)))
    constant = min(len(set(points["fid"])), len(set(points[name]))) < 2
    correlation = {} if constant else {"rank_correlation": float(spearmanr(points["fid"], points[name])[0])}
    return {"along": points} | correlation


def open_snapshot(run, file):
    """(step, the run with the generator that it had then)."""
    saved = load_tensors(file)
    try:
        nets = fresh_networks(run.model, run.config, run.device)
        for name, state in saved["networks"].items():
            nets[name].load_state_dict(state)
        return saved["step"], replace(run, nets=nets)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file} is not a snapshot of this run") from error
