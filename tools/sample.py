"""Pictures and arrays out of a trained run.

python -m tools.sample runs/wgan-mnist                                  a grid of 64
python -m tools.sample runs/wgan-mnist --n 10000 --out pictures         single PNG files
python -m tools.sample runs/wgan-mnist --n 10000 --out samples.npz      arr_0, uint8 N×H×W×C
python -m tools.sample runs/wbli-mnist --interpolate
python -m tools.sample runs/wbli-mnist --reconstruct one.png two.png
python -m tools.sample runs/cgan-mnist --label 3
"""

from pathlib import Path

from tools.flags import Parser, whole


def parse(argv):
    """The parser and the flags."""
    parser = Parser("tools.sample", __doc__.split("\n")[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", type=Path, help="the folder of a run")
    flag("--n", type=whole(1), help="how many; 64, points 2500, reconstructions half, unless given")
    flag("--out", type=Path, help="FILE.png: a grid; FILE.npz: arr_0; else a folder of PNG files")
    flag("--label", type=whole(0), metavar="K", help="samples of this class, code or component alone")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--interpolate", action="store_true", help="rows between pairs of z")
    pairs = "pairs x, G(E(x)) of test items or these pictures"
    ways.add_argument("--reconstruct", metavar="FILE", nargs="*", help=pairs)
    parser.add_shared(batch_size=250)
    options = parser.parse_args(argv)
    if options.label is not None and options.reconstruct is not None:
        parser.error("--label chooses z: it does not go with --reconstruct")
    return parser, options


def main(argv=None):
    """Write what the flags ask for and print its name."""
    parser, options = parse(argv)
    from tools import drawing
    from tools.runs import open_run

    with parser.mistakes():
        run = open_run(options.run, options.device)
        pairs = options.reconstruct is not None
        options.n = options.n or (64 if run.images else 2500) // (2 if pairs else 1)
        name = "reconstructions" if pairs else "interpolation" if options.interpolate else "samples"
        name += "" if options.label is None else f"-{options.label}"
        options.out = options.out or options.run / f"{name}.png"
        problem = drawing.refusal(run, options)
        if problem:
            raise ValueError(problem)
        x = drawing.reconstructed(run, options) if pairs else drawing.sampled(run, options)
        drawing.write(x, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
