"""python -m tools.bench [MODEL…]: how fast the training loops are on the device at hand.

Every figure is of a model file as it is: build() gives the step that is timed here. Times of a step are
medians of rounds in which all that is compared takes turns, so that what else the machine does hits all
alike; on CUDA they come from device events, and the time of the loop round the step, train(), by the clock
on the wall, is the median of three runs. Kernels, arithmetic and memory traffic of a step are counted
operator by operator; on CUDA the time that they need at least is the floor.
"""

import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

from tqdm import tqdm

from tools.flags import Parser, memory_is_full, whole
from tools.tables import aligned

COLUMNS = {  # key in a result: (title, unit, a factor for the table)
    "steps_per_s": ("steps/s", "", 1),
    "images_per_s": ("images/s", "", 1),
    "iteration_s": ("iteration", "ms", 1e3),
    "loop_s": ("loop", "ms", 1e3),
    "eager_s": ("eager", "ms", 1e3),
    "python_adds": ("Python adds", "%", 1e2),
    "gpu_busy": ("GPU busy", "%", 1e2),
    "host_s": ("data on host", "ms", 1e3),
    "baseline_s": ("baseline", "ms", 1e3),
    "times_faster": ("times faster", "", 1),
    "kernels": ("kernels", "", 1),
    "flops": ("arithmetic", "GFLOP", 1e-9),
    "bytes": ("traffic", "MiB", 2**-20),
    "floor_s": ("floor", "ms", 1e3),
    "of_floor": ("floor / iteration", "%", 1e2),
    "peak_bytes": ("peak memory", "MiB", 2**-20),
    "reserved_bytes": ("reserved", "MiB", 2**-20),
    "start_s": ("to step 1", "s", 1),
}
SETTINGS = ("dataset", "image_size", "batch_size", "width", "network")
SWEEP = {"batch_size": (0.5, 2, 4), "width": (0.5, 2), "image_size": (2,)}  # times the setting


# The command


def table(results):
    """Lists of strings for tools.tables: a row a model, the columns that have a value."""
    columns = {key: column for key, column in COLUMNS.items() if any(key in result for result in results)}
    rows = [["model", *(f"{title} [{unit}]" if unit else title for title, unit, _ in columns.values())]]
    for result in results:
        values = {key: result[key] * factor for key, (_, _, factor) in columns.items() if key in result}
        rows.append([result["model"], *(f"{values[key]:.4g}" if key in values else "–" for key in columns)])
    return rows


def sweep_table(results):
    """A row for each setting: what a step costs, also as a multiple of the model's first, and as a power."""
    rows, base = [["model", "setting", "step [ms]", "× the cost", "power"]], {}
    for result in results:
        first = base.setdefault(result["model"], result)
        key = next((key for key in SWEEP if result[key] != first[key]), None)
        times = result["iteration_s"] / first["iteration_s"]
        power = f"{math.log(times) / math.log(result[key] / first[key]):.2f}" if key else "–"
        setting = f"{key.replace('_', ' ')} {result[key]}" if key else "as given"
        rows.append([result["model"], setting, f"{result['iteration_s'] * 1e3:.2f}", f"{times:.2f}", power])
    return rows


def tasks(name, options):
    """The arguments of timing.measure for a model: one task, or with --sweep one for each setting."""
    from importlib import import_module

    flags = ["--device", options.device.type, "--seed", str(options.seed)]
    for key in ("data_dir", *SETTINGS):
        if getattr(options, key) is not None:
            flags += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    if not options.sweep:
        return [(name, flags, options.seconds, options.baseline, True)]
    model = import_module(name)
    config, variants = model.parse_args(flags), [[]]
    for key, factors in SWEEP.items():
        if key == "image_size" and config.dataset in model.POINTS:
            continue  # points have none
        values = {max(2, round(getattr(config, key) * factor)) for factor in factors} - {getattr(config, key)}
        variants += [[f"--{key.replace('_', '-')}", str(value)] for value in sorted(values)]
    return [(name, flags + variant, options.seconds, False, False) for variant in variants]


def in_a_process(task):
    """measure(*task) in a fresh process, so that memory is its own and nothing is left behind."""
    from tools.timing import measure

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *task).result()


def main(argv=None):
    """Measure and print as the flags say; 2 if something could not be measured."""
    parser = Parser("tools.bench", __doc__.split("\n")[0])
    flag = parser.add_argument
    flag("models", nargs="*", help="names of model files; all unless given")
    flag("--dataset", help="as in the model files")
    flag("--image-size", type=whole(1), help="pixels")
    flag("--width", type=whole(1), help="as in the model files")
    flag("--network", choices=("conv", "mlp"), help="kind of all networks")
    flag("--seconds", type=whole(1), default=10, help="for each figure")
    flag("--baseline", action="store_true", help="time a plain loop of the same networks too")
    flag("--sweep", action="store_true", help="what other batches, widths and sizes cost")
    flag("--json", metavar="FILE", help="write the figures there too")
    parser.add_shared(batch_size=None)
    options = parser.parse_args(argv)
    if options.sweep and options.baseline:
        parser.error("--sweep times the models alone: it does not go with --baseline")
    from tools.runs import model_names

    models = parser.known(options.models, model_names(), "model file")
    if options.json:
        try:
            open(options.json, "a").close()  # found before minutes of measuring
        except OSError as error:
            parser.error(f"--json: {error}")
    results = []
    todo = [task for name in models for task in tasks(name, options)]
    for task in tqdm(todo, "measuring", disable=None):
        try:
            results.append(in_a_process(task))
        except (OSError, ValueError) as error:
            parser.complain(f"{task[0]}: {error}")
        except (MemoryError, RuntimeError) as error:
            if not memory_is_full(error):
                raise
            parser.complain(f"{task[0]} finds too little memory: take a smaller --batch-size or --width")
    if not results:
        sys.exit(2)
    print(aligned(sweep_table(results) if options.sweep else table(results)))
    import torch

    about = {"torch": torch.__version__, "date": str(date.today())}
    about |= {key: results[0][key] for key in ("device", "dataset", "image_size")}
    print("; ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items()))
    if options.json:
        Path(options.json).write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    if parser.failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
