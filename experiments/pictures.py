"""python -m experiments.pictures RUNS: the documentation's pictures, from the last ones of each model's run.

RUNS/<model> is the run of each model. Writes docs/<model>.png (samples, then reconstructions or columns of
classes, codes or components) and docs/strip.png (a corner of each model's samples under its name).
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tools.flags import Parser
from tools.sync import MODELS

DOCS = Path(__file__).resolve().parents[1] / "docs"
NAMES = {
    "dcgan": "DCGAN",
    "wgan": "WGAN",
    "wgan_gp": "WGAN-GP",
    "bigan": "BiGAN",
    "wbli": "WBLI",
    "gm_wae": "GM-WAE",
    "alpha_gan": "α-GAN",
    "cgan": "CGAN",
    "infogan": "InfoGAN",
    "semi_gan": "Semi-GAN",
    "loss_sensitive_gan": "LS-GAN",
    "age": "AGE",
}
BESIDE = ("reconstructions", "classes", "codes", "components")  # shown beside samples where a run has them
GAP = 12


def last_picture(run, folder):
    """The last picture that a run has drawn there, or None."""
    paths = sorted(Path(run, folder).glob("*.png"))
    return Image.open(paths[-1]) if paths else None


def side_by_side(pictures):
    """Pictures in a row on white."""
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    row = Image.new(pictures[0].mode, (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + GAP
    return row


def strip(corners, columns=6):
    """{name: picture} in rows of `columns`, each picture under its name."""
    size, title = 128, 26
    rows = -(-len(corners) // columns)
    sheet = Image.new("RGB", (columns * (size + GAP) - GAP, rows * (size + title + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for i, (name, corner) in enumerate(corners.items()):
        left, top = i % columns * (size + GAP), i // columns * (size + title + GAP)
        draw.text((left, top + 3), name.replace("α", "alpha"), fill="black", font=font)
        sheet.paste(corner, (left, top + title))
    return sheet


def main(argv=None):
    """Write them all."""
    parser = Parser("experiments.pictures", __doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="the folder that holds a run of each model")
    parser.set_defaults(device="cpu")
    runs, corners = parser.parse_args(argv).runs, {}
    if not any(last_picture(runs / model, "samples") for model in MODELS):
        parser.error(f"{runs} has no run of a model with samples")
    for model in MODELS:
        samples, page = last_picture(runs / model, "samples"), DOCS / f"{model}.png"
        if samples is None:
            print(f"{runs / model} has no samples: {page.name} stays as it is")
            samples = Image.open(page)
        else:
            beside = [last_picture(runs / model, folder) for folder in BESIDE]
            side_by_side([samples, *filter(None, beside)]).save(page)
        corners[NAMES[model]] = samples.crop((0, 0, 128, 128))
    strip(corners).save(DOCS / "strip.png")


if __name__ == "__main__":
    main()
