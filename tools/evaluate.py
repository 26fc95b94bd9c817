"""Measures trained runs and puts them side by side.

python -m tools.evaluate runs/*                        a table, and evaluation.json in each run
python -m tools.evaluate runs/* --report report        a Markdown report with figures as well
python -m tools.evaluate runs/* --split validation     for choosing settings; evaluation-validation.json
"""

import sys
from pathlib import Path

from tools import tables
from tools.flags import Parser, whole


def main(argv=None):
    """Evaluate the runs, print a table for each data set, write what was asked for; 2 if a run failed."""
    parser = Parser("tools.evaluate", __doc__.split("\n")[0])
    flag = parser.add_argument
    flag("runs", metavar="RUN", type=Path, nargs="+", help="the folder of a run")
    flag("--n", type=whole(2), help="samples; 10000, points 2500, unless given")
    flag("--split", choices=("validation", "test"), default="test", help="what runs are measured against")
    flag("--report", metavar="DIR", type=Path, help="write a Markdown report with figures into this folder")
    parser.add_shared(batch_size=250)
    options = parser.parse_args(argv)
    parser.needs("scipy", "sklearn", "torchmetrics", *(["matplotlib", "umap"] if options.report else []))
    from tools import evaluation

    finished = []
    with parser.mistakes():
        for runs in evaluation.opened(options, parser.complain).values():
            data, done = evaluation.evaluate_group(runs, options, parser.complain)
            if done:
                finished.append((data, done))
                print(tables.text(done), flush=True)
        if options.report and finished:
            from tools import report

            try:
                print(report.write(options.report, finished))
            except (OSError, ValueError) as error:
                parser.complain(f"--report {options.report}: {error}")
    if parser.failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
