"""The tables of an evaluation: a row a run, a column a measure, the best of each marked."""

import math
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

DIGITS = ("mnist", "glyphs", "color_mnist", "stacked_mnist")  # sets whose classes are digits
# What two runs may differ in and still count as the same but for the seed.
FREE = {"seed", "device", "data_dir", "log_every", "sample_every", "save_every"}


@dataclass(frozen=True)
class Metric:
    """A column: its title, the format of its numbers, and which is best: "lower", "higher", "data" or None.

    "data": the one nearest to the value of real data.
    """

    title: str
    form: str
    best: str | None


METRICS = {
    "fid": Metric("classifier FID", ".2f", "lower"),
    "inception_score": Metric("classifier IS", ".2f", "higher"),
    "rarest_class": Metric("rarest class", ".1%", "higher"),
    "entropy": Metric("entropy", ".3f", "higher"),
    "diversity": Metric("diversity", ".3f", "data"),
    "critic": Metric("critic W", ".3f", "lower"),
    "modes": Metric("modes", ".0f", "higher"),
    "high_quality": Metric("high quality", ".1%", "higher"),
    "kl_modes": Metric("KL modes", ".3f", "lower"),
    "kl_uniform": Metric("KL uniform", ".3f", "lower"),
    "reconstruction": Metric("error", ".4f", "lower"),
    "reconstruction_random": Metric("error, random pair", ".4f", None),
    "label_kept": Metric("label kept", ".1%", "higher"),
    "nn_z": Metric("1-NN z", ".2%", "higher"),
    "nn_features": Metric("1-NN features", ".2%", "higher"),
    "nn_untrained": Metric("1-NN untrained", ".2%", None),
    "probe_z": Metric("probe z", ".2%", "higher"),
    "probe_features": Metric("probe features", ".2%", "higher"),
    "probe_untrained": Metric("probe untrained", ".2%", None),
    "asked": Metric("asked", ".1%", "higher"),
    "asked_worst": Metric("asked, worst", ".1%", "higher"),
    "accuracy": Metric("accuracy", ".1%", "higher"),
    "matching": Metric("matching", ".1%", "higher"),
    "nmi": Metric("NMI", ".3f", "higher"),
    "least_used": Metric("least used", ".1%", "higher"),
}


def title(name, dataset):
    """The head of a column; with whose features FID and IS are computed is always said."""
    head = METRICS[name].title
    return f"digit-{head}" if head.startswith("classifier") and dataset in DIGITS else head


def cost(name, value, real=None):
    """The less, the better is this value of the measure; `real` is that of real data."""
    best = METRICS[name].best
    if best == "data":
        return abs(value - real)
    return value if best == "lower" else -value


def best_of(name, values, real):
    """The indices of the best of these numbers, some perhaps None; [] if all or none of them are."""
    present = [i for i, value in enumerate(values) if value is not None]
    rule = METRICS[name].best
    if len(present) < 2 or rule is None or (rule == "data" and real is None):
        return []
    costs = {i: cost(name, values[i], real) for i in present}
    least = min(costs.values())
    best = [i for i in present if costs[i] == least]
    return [] if len(best) == len(present) else best


def seeds(configs):
    """[indices] of runs that differ in nothing but their seed, two or more; configs are dictionaries."""
    groups = defaultdict(list)
    for i, config in enumerate(configs):
        groups[repr(sorted((k, v) for k, v in config.items() if k not in FREE))].append(i)
    return [group for group in groups.values() if len({configs[i].get("seed") for i in group}) > 1]


def mean_and_deviation(values):
    """(mean, standard deviation with n − 1) of those that are not None; None for fewer than two."""
    values = [value for value in values if value is not None]
    return (mean(values), stdev(values)) if len(values) > 1 else None


def labels_of(runs):
    """What to call runs: the names of their folders, or the whole paths if two have the same name."""
    names = [Path(run.path).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def rows(done):
    """The table as lists of strings: its head, a row for each run, means over seeds, what to compare with.

    done: [(run, its evaluation)], all on the same data.
    """
    labels, results = labels_of([run for run, _ in done]), [result for _, result in done]
    dataset = results[0]["dataset"]
    used = [name for name in METRICS if any(name in result["metrics"] for result in results)]
    references = {name: found for result in results for name, found in result["references"].items()}
    references = {name: found for name, found in references.items() if found.keys() & used}
    same = seeds([vars(run.config) | {"model": run.name, "step": run.step} for run, _ in done])
    steps = [str(result["step"]) for result in results]
    means = [f"mean of {len(group)}: {labels[group[0]]} …" for group in same]
    columns = [["run", *labels, *means, *references]]
    columns += [["step", *steps, *(steps[group[0]] for group in same), *[""] * len(references)]]
    for name in used:
        form, values = METRICS[name].form, [result["metrics"].get(name) for result in results]
        best = best_of(name, values, references.get("real data", {}).get(name))
        column = [title(name, dataset)]
        for i, value in enumerate(values):
            column.append("–" if value is None else format(value, form) + (" *" if i in best else ""))
        for group in same:
            found = mean_and_deviation([values[i] for i in group])
            column.append(" ± ".join(format(value, form) for value in found) if found else "–")
        for reference in references.values():
            column.append(format(reference[name], form) if name in reference else "–")
        columns.append(column)
    return [list(row) for row in zip(*columns, strict=True)]


def aligned(table, width=None):
    """The table as text: the first column to the left, numbers to the right, the mark behind them.

    Lines longer than `width`, that of the terminal unless given, are broken between columns, into blocks
    that all begin with the first one.
    """
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    padded = []
    for i, column in enumerate(zip(*table, strict=True)):
        marks = any(cell.endswith(" *") for cell in column)
        cells = [cell if cell.endswith(" *") or not marks else cell + "  " for cell in column]
        widest = max(map(len, cells))
        padded.append([cell.ljust(widest) if i == 0 else cell.rjust(widest) for cell in cells])
    first, *others = padded
    blocks = [[first]]
    for column in others:
        if len(blocks[-1]) > 1 and len("  ".join(cells[0] for cells in [*blocks[-1], column])) > width:
            blocks.append([first])
        blocks[-1].append(column)
    return "\n\n".join(
        "\n".join("  ".join(row).rstrip() for row in zip(*block, strict=True)) for block in blocks
    )


def markdown(table):
    """The table in Markdown, the best in bold."""

    def line(cells):
        return "| " + " | ".join(cells) + " |"

    bold = [[f"**{cell[:-2]}**" if cell.endswith(" *") else cell for cell in row] for row in table]
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    return "\n".join([line(bold[0]), line(rule), *map(line, bold[1:])])


def caption(result):
    """What the numbers of a table rest on, in a line or two."""
    settings = result["settings"]
    parts = [f"{result['dataset']}, {result['split']} split: {result['n']} samples, seed {result['seed']}"]
    if result["n_real"] < result["n"]:
        parts.append(f"{result['n_real']} real items")
    if "classifier" in settings:
        kind = "digit classifier" if settings["classifier"]["of"] == "digits" else "classifier"
        parts.append(f"{kind} with {settings['classifier']['test_accuracy']:.2%} test accuracy")
    if "ms_ssim" in settings:
        of = settings["ms_ssim"]
        window = f"{of['window']}×{of['window']} window, σ {of['sigma']}"
        parts.append(f"diversity 1 − MS-SSIM over {of['scales']} scales, {window}")
    if "critic" in settings:
        of, (first, last) = settings["critic"], settings["critic"]["gp_weight"]
        parts.append(f"critic W after {of['steps']} steps of batch {of['batch']}, λ {first} to {last}")
    return "; ".join(parts)


def text(done):
    """The aligned table with its caption."""
    return aligned(rows(done)) + "\n" + caption(done[0][1]) + "; * the best\n"
