"""python -m experiments.quality [MODEL …]: how long until the samples look good, on one CPU core.

Trains each model by the smaller command of commands.txt, in pieces that leave a checkpoint each and make the
same run as the command alone. FID of each checkpoint's samples is drawn over the minutes that one core needs
until there: what comes before the first step (GM-WAE's pre-training) and steps × the time of a step, both
measured last. Draws quality.png.
"""

import shlex
import time
from importlib import import_module
from pathlib import Path

from tools.flags import Parser, whole
from tools.sync import MODELS
from tools.tables import aligned, title

COMMANDS = Path(__file__).with_name("commands.txt")
MINUTES = (1, 2, 5, 10, 20, 40)  # columns of the table
SECONDS = 5  # for which steps are timed


def commands():
    """{model: flags of its smaller command}."""
    found = {}
    for line in COMMANDS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, *flags = shlex.split(line.replace("|", " "))
            found[name] = flags
    return found


def checkpoints(name, flags, path, steps, points):
    """(step, folder of its checkpoint) along a run, about so many: of a finished run those that are there.

    ValueError if the run was begun with other flags.
    """
    from experiments.training import check_flags, chunks

    check_flags(name, flags, path)
    there = sorted((path / "checkpoints").glob("*/checkpoint.pt"), reverse=True)
    found = [(int(file.parent.name), file.parent) for file in there if int(file.parent.name)]
    if found and found[0][0] == steps:
        return thinned(found, points)
    return chunks(name, flags, path, steps, max(1, steps // points))


def thinned(found, points):
    """About so many of these (step, folder), evenly on a log axis; `found` begins with the last step."""
    kept, ratio = found[:1], (found[0][0] / found[-1][0]) ** (1 / (points - 1))
    for step, folder in found[1:]:
        if step * ratio <= kept[-1][0]:
            kept.append((step, folder))
    return kept[::-1]


def seconds_of(name, flags):
    """(before the first step, of a step) on one CPU core: a median over some seconds, without logging."""
    import torch

    from tools import timing
    from tools.runs import load_sets, seeded

    model = import_module(name)
    config = model.parse_args([*flags, "--device", "cpu"])
    train_set, test_set = load_sets(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with seeded(config.seed):
            start = time.perf_counter()
            iteration = model.build(config, train_set, test_set)[2]
            before = time.perf_counter() - start
            return before, timing.race({"step": iteration}, SECONDS, torch.device("cpu"))["step"]
    finally:
        torch.set_num_threads(threads)


def at_minutes(minutes, fid):
    """FID of the last checkpoint before each of MINUTES; a dash where there is none or the run is over."""
    cells = []
    for asked in MINUTES:
        before = [value for minute, value in zip(minutes, fid, strict=True) if minute <= asked]
        cells.append(f"{before[-1]:.2f}" if before and minutes[-1] >= asked else "–")
    return cells


def draw(curves, fid, path):
    """A line a model, both axes logarithmic; curves: {model: (minutes, FID)}."""
    from tools import figures

    figure, (panel,) = figures.axes(width=7.5, height=5)
    for i, (model, (minutes, values)) in enumerate(curves.items()):
        style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--", "marker": ".", "linewidth": 1}
        panel.plot(minutes, values, label=model, **style)
    panel.set(xscale="log", yscale="log", xlabel="minutes of one CPU core", ylabel=fid)
    panel.set_xticks(MINUTES, MINUTES)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="x-small", ncols=2)
    figures.save(figure, path)


def main(argv=None):
    """Train, measure, time, print and draw as the flags say."""
    parser = Parser("experiments.quality", __doc__.split("\n")[0])
    flag = parser.add_argument
    flag("models", nargs="*", help="names of model files; all unless given")
    flag("--points", type=whole(2), default=10, help="checkpoints of each run")
    flag("--steps", type=whole(2), help="of each run, in place of its own number")
    flag("--flags", type=shlex.split, default="", help="more flags of the model files")
    flag("--n", type=whole(100), default=2000, help="samples of each checkpoint")
    flag("--out", type=Path, default="quality", help="folder for runs and the figure")
    parser.add_places()
    options = parser.parse_args(argv)
    chosen = parser.known(options.models, MODELS, "model")
    parser.needs("matplotlib", "scipy", "torchmetrics")
    from experiments.along import measured

    places = ["--data-dir", options.data_dir, "--device", options.device.type]
    rows = [["model", "ms per step", *(f"{minute} min" for minute in MINUTES), "last", "at min"]]
    runs, curves = {}, {}
    with parser.mistakes():
        for name in chosen:
            flags = [*commands()[name], *options.flags, *places]
            config = import_module(name).parse_args(flags)
            path, steps = options.out / name, options.steps or config.steps
            pieces = checkpoints(name, flags, path, steps, options.points)
            runs[name] = flags, measured(pieces, path, options)
        for name, (flags, found) in runs.items():
            (before, seconds), fid = seconds_of(name, flags), found["fid"]
            minutes = [(before + step * seconds) / 60 for step in found["step"]]
            curves[name] = minutes, fid
            last = f"{fid[-1]:.2f}", f"{minutes[-1]:.1f}"
            rows.append([name, f"{1000 * seconds:.0f}", *at_minutes(minutes, fid), *last])
        draw(curves, title("fid", config.dataset), options.out / "quality.png")
    print(aligned(rows))
    parser.sign(options.device)


if __name__ == "__main__":
    main()
