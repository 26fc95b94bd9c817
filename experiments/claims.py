"""python -m experiments.claims [lines|gaussians|depth|momentum …]: claims of papers, without a data set.

    lines      WGAN, example 1: of two parallel lines EM tells the distance, JS is log 2 at any distance
    gaussians  WGAN, figure 2: between two Gaussians D saturates, F stays close to linear; LS-GAN's L beside
    depth      WGAN-GP, figure 1b: clipped, a deep critic's gradients explode or vanish; weights go to ±c
    momentum   WGAN, section 4.2: with momentum the critic's updates turn against the gradient, W blows up

Networks and losses are those of the model files. Each claim prints a table and draws claims-<name>.png.
"""

from importlib import import_module
from pathlib import Path

from tools.flags import Parser, whole
from tools.tables import aligned

CLAIMS = {  # name: the module with a function of this name, and the steps of each of its trainings
    "lines": ("experiments.wasserstein", 2000),
    "gaussians": ("experiments.wasserstein", 400),
    "depth": ("experiments.wasserstein", 300),
    "momentum": ("experiments.wasserstein", 300),
}


def main(argv=None):
    """Check and print as the flags say."""
    parser = Parser("experiments.claims", __doc__.split("\n")[0])
    flag = parser.add_argument
    flag("claims", nargs="*", help=f"of {', '.join(CLAIMS)}; all unless given")
    flag("--steps", type=whole(1), help="of each training, in place of the claim's own number")
    flag("--out", default="claims", help="folder for the figures")
    flag("--seed", type=whole(0), default=0, help="fixes everything random")
    parser.set_defaults(device="cpu")
    options = parser.parse_args(argv)
    chosen = parser.known(options.claims, CLAIMS, "claim")
    parser.needs("matplotlib")

    from tools.runs import seeded

    with parser.mistakes():
        Path(options.out).mkdir(parents=True, exist_ok=True)
        for name in chosen:
            module, steps = CLAIMS[name]
            steps, path = options.steps or steps, Path(options.out) / f"claims-{name}.png"
            with seeded(options.seed):
                rows = getattr(import_module(module), name)(steps, path)
            print(f"{name}, {steps} steps, seed {options.seed}, {path}\n{aligned(rows)}\n", flush=True)
    parser.sign(options.device)


if __name__ == "__main__":
    main()
