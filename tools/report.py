"""The report of an evaluation: Markdown and figures in one folder."""

from contextlib import suppress

import numpy as np

from common import as_float, save_grid
from tools import figures, tables
from tools.runs import draw_z, samples

PROJECTED = 1000  # test items, and as many draws from the prior, in the UMAP of a mixture


def write(folder, finished):
    """Write report.md and its figures, for [(data, [(run, evaluation)])]; returns the path of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# Evaluation"]
    for i, (data, done) in enumerate(finished):
        parts += section(folder, f"{i:02d}", data, done)
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return folder / "report.md"


def section(folder, prefix, data, done):
    """The paragraphs about the runs on one data set, whose figures begin with the prefix."""
    runs, results = [run for run, _ in done], [result for _, result in done]
    labels = tables.labels_of(runs)
    parts = [f"## {data.name}", tables.markdown(tables.rows(done)), tables.caption(results[0]) + "."]
    missing = [
        f"- {label}: {text}" for label, r in zip(labels, results, strict=True) for text in r["not_measured"]
    ]
    parts += ["Not measured:\n\n" + "\n".join(missing)] if missing else []

    def figure(name, draw, text):
        file = f"{prefix}-{name}.png"
        draw(folder / file)
        parts.append(f"![{text}]({file})\n\n{text}.")

    cells = []
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        file = f"{prefix}-samples-{i:02d}.png"
        x = samples(run, draw_z(run, 64 if run.images else 2500, data.options.seed), 250)
        save_grid(as_float(x), folder / file, 8)
        cells.append((label, f"![samples of {label}]({file})"))
    parts.append(side_by_side(cells))

    curves = {label: read_metrics(run.path) for label, run in zip(labels, runs, strict=True)}
    curves = {label: columns for label, columns in curves.items() if columns and len(columns["step"])}
    if curves:
        windows = sorted({figures.window(len(columns["step"])) for columns in curves.values()})
        rows = " to ".join(str(size) for size in dict.fromkeys([windows[0], windows[-1]]))
        text = f"Learning curves, through a median filter of {rows} rows of metrics.csv"
        figure("curves", lambda path: figures.curves(curves, path), text)
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        if not run.images and (score := figures.score_of(run)):
            x = samples(run, draw_z(run, 1000, data.options.seed), 1000)
            text = f"{label}: level sets of the {score}, with real (orange) and generated points (green)"
            figure(
                f"levels-{i:02d}", lambda path, run=run, x=x: figures.levels(run, data.x_test, x, path), text
            )
        if run.images and data.labelled and run.has("classify"):
            text = f"{label}: mean probabilities over the test items of each label"
            figure(f"heat-{i:02d}", lambda path, run=run: figures.heat_map(run, data, path), text)
        if run.images and data.labelled and run.has("classify") and run.has("encode"):
            text = f"{label}: UMAP of {PROJECTED} test items, coloured by label, and as many z of the prior"
            figure(f"umap-{i:02d}", lambda path, run=run: figures.umap(run, data, PROJECTED, path), text)
    return parts


def read_metrics(path):
    """{column: float array} of the run's metrics.csv, "step" first; {} if there is none.

    Rows that are not whole, as another program or a full disk may leave them, are left out.
    """
    file = path / "metrics.csv"
    if not file.exists():
        return {}
    header, *lines = file.read_text("utf-8-sig", errors="replace").splitlines() or [""]
    header, rows = header.split(","), []
    for line in lines:
        with suppress(ValueError):
            rows.append([float(cell) for cell in line.split(",")])
    whole = [row for row in rows if len(row) == len(header)]
    return dict(zip(header, np.array(whole).reshape(-1, len(header)).T, strict=True))


def side_by_side(cells, columns=4):
    """Markdown tables of (title, content), so many columns wide."""
    blocks = []
    for start in range(0, len(cells), columns):
        titles, contents = zip(*cells[start : start + columns], strict=True)
        rule = ["---"] * len(titles)
        blocks.append("\n".join("| " + " | ".join(row) + " |" for row in (titles, rule, contents)))
    return "\n\n".join(blocks)
