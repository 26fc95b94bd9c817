"""Pictures and arrays out of a trained run.

python -m tools.sample runs/wgan-mnist                                  a grid of 64
python -m tools.sample runs/wgan-mnist --n 10000 --out pictures         single PNG files
python -m tools.sample runs/wgan-mnist --n 10000 --out samples.npz      arr_0, uint8 N×H×W×C
python -m tools.sample runs/wbli-mnist --interpolate
python -m tools.sample runs/wbli-mnist --reconstruct one.png two.png
python -m tools.sample runs/gm_wae-mnist --component 3
"""

import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import SUFFIXES, as_float, read_picture, resize, save_grid
from tools.runs import Parser, draw_z, load_split, open_run, reconstructions, samples, whole

COLUMNS = 8
PADDED = ("mnist", "fashion_mnist", "color_mnist", "stacked_mnist")  # from 28×28 to 32×32, then resized


def between(a, b, t, prior):
    """From a (N, d), at t = 0, to b, at t = 1, for t of shape (T,): (N, T, d).

    On a great circle for the prior "normal", as Gaussian z lie near a sphere and a chord would leave it;
    else, and between z in one direction, on a straight line.
    """
    a, b, t = a[:, None], b[:, None], t[:, None]
    straight = (1 - t) * a + t * b
    if prior != "normal":
        return straight
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1)[..., None]
    angle = cosine.arccos()
    circle = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return torch.where(angle.sin() > 1e-4, circle, straight)


def sampled(run, options):
    """Samples, or those on the ways between pairs of z, a row each, in the form of runs.samples."""
    if not options.interpolate:
        return samples(run, draw_z(run, options.n, options.seed, options.component), options.batch_size, "G")
    columns = COLUMNS if run.images else 50  # points: ways that are seen as lines
    rows = -(-options.n // columns)
    a, b = draw_z(run, 2 * rows, options.seed, options.component).chunk(2)
    z = between(a, b, torch.linspace(0, 1, columns), run.config.prior)
    return samples(run, z.flatten(0, 1), options.batch_size, "G")


def reconstructed(run, options):
    """Pairs x, G(E(x)) of the given files or else of test items: (N, 2, …) in the form of runs.samples."""
    if options.reconstruct:
        x = torch.stack([read_file(path, run.config) for path in options.reconstruct])
    else:
        x, _ = load_split(run, "test", options.data_dir)
        x = x[: options.n]
    return torch.stack([x, reconstructions(run, x, options.batch_size, "G(E(x))")], dim=1)


def read_file(path, config):
    """A picture file as bytes of the run's shape, (C, S, S); ValueError if it cannot be read.

    One of 28×28 is padded with black if the run's data set was.
    """
    from PIL import Image

    channels, size, _ = config.shape
    try:
        with Image.open(path) as picture:
            padded = picture.size == (28, 28) and config.dataset in PADDED
        picture = read_picture(path, 28 if padded else size)
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error})") from error
    if channels == 1:
        picture = np.asarray(Image.fromarray(picture.transpose(1, 2, 0)).convert("L"))[None]
    x = torch.from_numpy(picture.copy())[None]
    return resize(torch.nn.functional.pad(x, (2, 2, 2, 2)) if padded else x, size)[0]


def write(x, out):
    """Into a grid for a name in .png, an array for .npz, else one PNG for each item in the folder `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        save_grid(as_float(x), out, COLUMNS)
    elif out.suffix == ".npz":
        x = x.movedim(-3, -1) if x.dtype == torch.uint8 else x
        with open(f"{out}.tmp", "wb") as file:
            np.savez(file, x.numpy())
        os.replace(f"{out}.tmp", out)
    else:
        out.mkdir(exist_ok=True)
        for i, item in enumerate(tqdm(x, "writing", disable=None, leave=False)):
            save_grid(as_float(item[None]), out / f"{i:06d}.png", 2 if item.dim() == 4 else 1)


def refusal(run, options):
    """Why the flags do not fit the run, or None."""
    file = options.out.suffix in (".png", ".npz")
    if options.reconstruct is not None and not run.has("encode"):
        return f"{run.path} has no encoder: {run.config.model} does not reconstruct"
    if options.component is not None and not run.components:
        return f"{run.path}: the prior of {run.config.model} has no components"
    if options.component is not None and options.component >= run.components:
        return f"--component {options.component}: {run.path} has 0 … {run.components - 1}"
    if not run.images and options.reconstruct:
        return f"{run.path} is of points: it cannot reconstruct picture files"
    if options.out.suffix.lower() in SUFFIXES and not file:
        return f"--out {options.out}: a grid is a name in .png, an array in .npz; others are folders"
    if not run.images and not file:
        return f"{run.path} is of points: --out takes a name in .png, for their density, or in .npz"
    if not file and options.out.is_dir() and any(options.out.iterdir()):
        return f"{options.out} is not empty: choose another --out, as its files would count as samples"
    return None


def parse(argv):
    """The parser and the flags."""
    parser = Parser("sample", __doc__.split("\n")[0])
    flag = parser.add_argument
    flag("run", metavar="RUN", type=Path, help="the folder of a run")
    flag("--n", type=whole(1), help="how many; 64, points 2500, reconstructions half, unless given")
    flag("--out", type=Path, help="FILE.png: a grid; FILE.npz: arr_0; else a folder of PNG files")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--interpolate", action="store_true", help="rows between pairs of z")
    ways.add_argument(
        "--reconstruct", metavar="FILE", nargs="*", help="pairs x, G(E(x)) of test items or these pictures"
    )
    flag("--component", type=whole(0), metavar="K", help="samples of this component of the prior")
    parser.add_shared(batch_size=250)
    options = parser.parse_args(argv)
    if options.component is not None and options.reconstruct is not None:
        parser.error("--component chooses z: it does not go with --reconstruct")
    return parser, options


def main(argv=None):
    """Write what the flags ask for and print its name."""
    parser, options = parse(argv)
    try:
        run = open_run(options.run, options.device)
        pairs = options.reconstruct is not None
        options.n = options.n or (64 if run.images else 2500) // (2 if pairs else 1)
        name = "reconstructions" if pairs else "interpolation" if options.interpolate else "samples"
        name += "" if options.component is None else f"-{options.component}"
        options.out = options.out or options.run / f"{name}.png"
        if problem := refusal(run, options):
            raise ValueError(problem)
        write(reconstructed(run, options) if pairs else sampled(run, options), options.out)
    except torch.OutOfMemoryError:
        parser.error(f"the memory of the {options.device} device is full: take a smaller --batch-size")
    except (OSError, ValueError) as error:
        parser.error(error)
    print(options.out)


if __name__ == "__main__":
    main()
