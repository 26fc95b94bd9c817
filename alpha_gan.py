"""α-GAN — Rosca et al., "Variational Approaches for Auto-Encoding Generative Adversarial Networks", 2017

Rosca, Lakshminarayanan, Warde-Farley & Mohamed, https://arxiv.org/abs/1706.04987. Variational inference of an
auto-encoder, its densities replaced by discriminators: D tells data from reconstructions and samples, C the
prior from codes. Each network minimises its own loss, with R(d) = −log d + log(1 − d) for a density ratio:

    E   λ|x − G(E(x))| + R(C(E(x)))
    G   λ|x − G(E(x))| + R(D(G(E(x)))) + R(D(G(z)))
    D   −log D(x) − log(1 − D(G(E(x)))) − log(1 − D(G(z)))
    C   −log C(z) − log(1 − C(E(x)))

Differs from the paper, or from others' code where they do not agree:
    labels of C   the prior is real; reversed in the first arXiv version, an error as its authors confirmed
    loss of D     its terms weigh 1 : 1 : 1, as in the paper's pseudo-code; 2 : 1 : 1 in some code
    λ             20, of a mean over pixels and channels, as others' 1 … 40; the likelihood has a sum
    updates       E, G, D, C, each on a batch of its own; some code updates G twice
    batch norm    none in C, as in others' code; in E, since its codes start too small for C without; G takes
                  codes and z in one batch, since in two it would hide by how much they differ
    settings      z 16, batch 64, Adam 5e-4 (0.5, 0.9), C as wide as the mlps, 3 layers; others' z 50 (MNIST)
                  and 128 (colour), Adam 1e-4 … 1e-3 (0.5, 0.9), C of 2 … 3 layers of 700 … 750 units

    python alpha_gan.py --width 16 --steps 1000    # minutes on a CPU, without a download
    python alpha_gan.py --dataset mnist
    python alpha_gan.py --resume runs/alpha_gan-mnist --steps 40000
"""

import json
import math
import os
import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import as_float, load_data, sample_batch, save_grid

# Networks


def conv_widths(shape, width, growth=2):
    """Channels of a conv net's layers from the image inwards, one for each halving down to 4×4 pixels."""
    layers = max(1, round(math.log2(shape[-1] / 4)))
    if len(shape) != 3 or shape[-1] != 4 * 2**layers:
        raise ValueError(f"a conv network takes 8, 16, 32, 64, … pixels, not {shape[-1]}; an mlp takes any")
    return [width * growth**i for i in range(layers)]


class Generator(nn.Sequential):
    """z (N, z_dim) → x (N, C, S, S) in [−1, 1]; `plain`: no batch norm and `width` channels everywhere."""

    def __init__(self, shape, z_dim, width, plain=False):
        widths = conv_widths(shape, width, growth=1 if plain else 2)[::-1]
        layers = [nn.Unflatten(1, (z_dim, 1, 1)), nn.ConvTranspose2d(z_dim, widths[0], 4)]
        for n_in, n_out in pairwise([*widths, shape[0]]):
            layers += [nn.Identity() if plain else nn.BatchNorm2d(n_in), nn.ReLU()]
            layers += [nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1)]
        super().__init__(*layers, nn.Tanh())


class Encoder(nn.Sequential):
    """x (N, C, S, S) → (N, n_out), `width` channels next to the image; `norm`: batch norm behind them."""

    def __init__(self, shape, n_out, width, norm):
        widths = conv_widths(shape, width)
        layers = [nn.Conv2d(shape[0], width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n, m in pairwise(widths):
            layers += [nn.Conv2d(n, m, 4, stride=2, padding=1)]
            layers += [nn.BatchNorm2d(m) if norm else nn.Identity(), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], n_out))


class Discriminator(nn.Sequential):
    """x (N, C, S, S) → logit (N,), `width` channels next to the image; `norm`: batch norm behind them."""

    def __init__(self, shape, width, norm):
        widths = conv_widths(shape, width)
        layers = [nn.Conv2d(shape[0], width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n_in, n_out in pairwise(widths):
            layers += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1)]
            layers += [nn.BatchNorm2d(n_out) if norm else nn.Identity(), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4), nn.Flatten(0))


def mlp(n_in, n_out, units, layers=3, norm=nn.Identity, slope=0.2):
    """(N, …) → (N, n_out) through `layers` hidden layers of LeakyReLU(slope); slope 0 is a ReLU."""
    hidden = [nn.Flatten()]
    for a, b in pairwise([n_in] + [units] * layers):
        hidden += [nn.Linear(a, b), norm(b), nn.LeakyReLU(slope)]
    return nn.Sequential(*hidden, nn.Linear(units, n_out))


def init_weights(module):
    """DCGAN's initial weights of a conv network: N(0, 0.02), the batch norm's gains N(1, 0.02)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


# Objective


def neg_log_ratio(logit):
    """R(d) = −log d + log(1 − d), which is −logit exactly, as d = sigmoid(logit)."""
    return -logit


def reconstruction_error(x, x_rec):
    """E |x − G(E(x))|, a mean over pixels and channels too: a larger image does not weigh more."""
    return (x - x_rec).abs().mean()


def encoder_loss(x, x_rec, c_code, rec_weight):
    """E minimises λ E|x − G(E(x))| + E R(C(E(x))). Logits of shape (N,)."""
    return rec_weight * reconstruction_error(x, x_rec) + neg_log_ratio(c_code).mean()


def generator_loss(x, x_rec, d_rec, d_fake, rec_weight):
    """G minimises λ E|x − G(E(x))| + E R(D(G(E(x)))) + E R(D(G(z))). Logits of shape (N,)."""
    ratios = neg_log_ratio(d_rec).mean() + neg_log_ratio(d_fake).mean()
    return rec_weight * reconstruction_error(x, x_rec) + ratios


def discriminator_loss(d_real, d_rec, d_fake):
    """D minimises −E log D(x) − E log(1 − D(G(E(x)))) − E log(1 − D(G(z))). Logits of shape (N,)."""
    return F.softplus(-d_real).mean() + F.softplus(d_rec).mean() + F.softplus(d_fake).mean()


def code_discriminator_loss(c_prior, c_code):
    """C minimises −E log C(z) − E log(1 − C(E(x))): the prior is its real. Logits of shape (N,)."""
    return F.softplus(-c_prior).mean() + F.softplus(c_code).mean()


# Training


def networks(config):
    """{"generator": z → x, "encoder": x → z, "discriminator": x → logit, "code_discriminator": z → logit}."""
    shape, size, z_dim, units = config.shape, math.prod(config.shape), config.z_dim, 8 * config.width
    if config.network == "mlp":
        norm, squash = (nn.BatchNorm1d, nn.Tanh()) if len(shape) == 3 else (nn.Identity, nn.Identity())
        decoder = mlp(z_dim, size, units, norm=norm, slope=0)
        generator, encoder = nn.Sequential(decoder, squash, nn.Unflatten(1, shape)), mlp(size, z_dim, units)
        discriminator = nn.Sequential(mlp(size, 1, units), nn.Flatten(0))
    else:
        generator = Generator(shape, z_dim, config.width).apply(init_weights)
        encoder = Encoder(shape, z_dim, config.width, norm=True)
        discriminator = Discriminator(shape, config.width, norm=True).apply(init_weights)
    nets = {"generator": generator, "encoder": encoder, "discriminator": discriminator}
    return nets | {"code_discriminator": nn.Sequential(mlp(z_dim, 1, units), nn.Flatten(0))}


def draw_z(n, config, device):
    """n draws from the prior N(0, I): (n, z_dim)."""
    return torch.randn(n, config.z_dim, device=device)


def generate(nets, z):
    """z (N, z_dim) → x_fake (N, *shape), images in [−1, 1]."""
    return nets["generator"](z)


def encode(nets, x):
    """x (N, *shape), images in [−1, 1] → z_hat (N, z_dim)."""
    return nets["encoder"](x)


def features(nets, x):
    """x (N, *shape) → the encoder's last hidden layer, (N, features)."""
    return nn.Sequential(*list(nets["encoder"])[:-1])(x)


def train(config, x_train, x_test, saved=None):
    """Train on x_train, as load_data gives it, into config.out, from the checkpoint `saved` if any."""
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    nets = nn.ModuleDict(networks(config)).to(device, memory_format=torch.channels_last)
    generator, encoder, discriminator, code_discriminator = nets.values()
    settings = {"lr": config.lr, "betas": (0.5, 0.9), "fused": True, "capturable": device.type == "cuda"}
    optimizers = {name: torch.optim.Adam(net.parameters(), **settings) for name, net in nets.items()}

    def update(loss, *names):  # these networks; the others get no gradient, nor the work of one
        loss.backward(inputs=[weight for name in names for weight in nets[name].parameters()])
        for name in names:
            optimizers[name].step()
            optimizers[name].zero_grad()

    def decode(z_hat, z):  # in one batch, so that batch norm shows by how much the codes are off
        return generator(torch.cat([z_hat, z])).chunk(2)

    def encoder_step():
        x, z = sample_batch(x_train, config.batch_size, device), draw_z(config.batch_size, config, device)
        z_hat = encoder(x)
        x_rec, _ = decode(z_hat, z)
        update(encoder_loss(x, x_rec, code_discriminator(z_hat), config.rec_weight), "encoder")
        return {"reconstruction": reconstruction_error(x, x_rec.detach())}

    def generator_step():
        x, z = sample_batch(x_train, config.batch_size, device), draw_z(config.batch_size, config, device)
        with torch.no_grad():
            z_hat = encoder(x)
        x_rec, x_fake = decode(z_hat, z)
        d_rec, d_fake = discriminator(x_rec), discriminator(x_fake)
        update(generator_loss(x, x_rec, d_rec, d_fake, config.rec_weight), "generator")
        return {}

    def discriminator_step():
        x, z = sample_batch(x_train, config.batch_size, device), draw_z(config.batch_size, config, device)
        with torch.no_grad():
            x_rec, x_fake = decode(encoder(x), z)
        d_real, d_rec, d_fake = discriminator(x), discriminator(x_rec), discriminator(x_fake)
        update(discriminator_loss(d_real, d_rec, d_fake), "discriminator")
        logits = {"D(x)": d_real, "D(G(E(x)))": d_rec, "D(G(z))": d_fake}
        return {name: logit.detach().sigmoid().mean() for name, logit in logits.items()}

    def code_discriminator_step():
        x, z = sample_batch(x_train, config.batch_size, device), draw_z(config.batch_size, config, device)
        with torch.no_grad():
            z_hat = encoder(x)
        c_prior, c_code = code_discriminator(z), code_discriminator(z_hat)
        update(code_discriminator_loss(c_prior, c_code), "code_discriminator")
        logits = {"C(z)": c_prior, "C(E(x))": c_code}
        return {name: logit.detach().sigmoid().mean() for name, logit in logits.items()}

    def iteration():  # each step sees what the one before has changed
        return encoder_step() | generator_step() | discriminator_step() | code_discriminator_step()

    def pictures(z):
        x = as_float(x_test[: len(z) // 2]).to(device)
        pairs = torch.stack([x, generate(nets, encode(nets, x))], dim=1)
        return {"samples": (generate(nets, z), 8), "reconstructions": (pairs, 8)}

    run(config, nets, optimizers, iteration, pictures, saved, device, x_train.is_cuda)


# Running: this model's defaults and flags; from `run` on the same in every model file

DEFAULTS = {"model": "alpha_gan", "prior": "normal", "batch_size": 64, "z_dim": 16, "width": 64, "lr": 5e-4}
DEFAULTS |= {"rec_weight": 20}
POINTS = {"network": "mlp", "z_dim": 2, "batch_size": 256, "rec_weight": 1}
VARIANTS = {"dataset": {"ring": POINTS, "grid": POINTS, "swissroll": POINTS}}  # what else they change
ABOVE = {"batch_size": 1, "seed": -1, "snapshots": -1}  # all numbers have to be above 0, but these


def add_flags(flag):
    """The model's own flags."""
    flag("--rec-weight", "--lambda", type=float, help="λ, the weight of the reconstruction")


def run(config, nets, optimizers, iteration, pictures, saved, device, capture):
    """Call `iteration` up to config.steps, from `saved` on; log, draw and save into config.out meanwhile."""
    out, first = Path(config.out), saved["step"] if saved else 0
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    if saved:
        fixed_z = saved["fixed_z"].to(device)
        for name, net in nets.items():
            net.load_state_dict(saved["networks"][name])
        for name, optimizer in optimizers.items():  # the moments alone: its flags are this device's
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["optimizers"][name]["state"]})
        torch.set_rng_state(saved["rng"]["cpu"])
        if device.type == "cuda" and "cuda" in saved["rng"]:
            torch.cuda.set_rng_state(saved["rng"]["cuda"])
        if (out / "metrics.csv").exists():  # a killed run logged more than it saved, perhaps half a row
            rows = [f"{row}\n" for row in (out / "metrics.csv").read_text().split("\n")[:-1]]
            rows[1:] = [row for row in rows[1:] if int(row.split(",")[0]) <= first]
            os.truncate(out / "metrics.csv", len("".join(rows)))
    else:
        fixed_z = draw_z(64 if len(config.shape) == 3 else 2500, config, device)
        save(0, config, nets, optimizers, fixed_z)
        (out / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
    (out / "config.json").write_text(json.dumps(vars(config), indent=1) + "\n")
    if capture:  # all work up to here is done, and a graph cannot be captured on the default stream
        torch.cuda.set_stream(torch.cuda.Stream())
    if device.type == "cpu":
        print("without a GPU: --width 16 --steps 1000 takes minutes, the defaults hours", file=sys.stderr)
    broken = torch.zeros((), device=device)  # since which step each number is not finite
    both, signals = (signal.SIGINT, signal.SIGTERM), []  # they end the run, after the running step
    handlers = {kind: signal.signal(kind, lambda number, frame: signals.append(number)) for kind in both}
    lines = {"mininterval": math.inf, "bar_format": "step {n} of {total} [{elapsed}, {rate_fmt}{postfix}]\n"}
    bar = tqdm(initial=first, total=config.steps, **({} if sys.stderr.isatty() else lines))
    try:
        for step in range(first + 1, config.steps + 1):
            if capture and step == first + 4:  # three real steps have made all state that the graph works on
                with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
                    metrics = iteration()  # recorded, not executed
                iteration = graph.replay  # a whole step in one call, which renews `metrics` and returns None
            metrics = iteration() or metrics
            broken = torch.where(torch.stack([*metrics.values()]).isfinite() | (broken > 0), broken, step)
            bar.update()
            last = step == config.steps or bool(signals)
            log, draw, keep = (step % getattr(config, f"{n}_every") == 0 for n in ("log", "sample", "save"))
            thin = step * config.snapshots % config.steps < config.snapshots
            if not (log or draw or keep or thin or last):
                continue
            at, name = min(zip(broken.tolist(), metrics, strict=True), key=lambda pair: pair[0] or math.inf)
            if at:
                fail(f"{name} was not finite at step {at:.0f}; {out}/checkpoint.pt is from before", code=1)
            if log:
                numbers = {name: f"{value:.6g}" for name, value in metrics.items()}
                with open(out / "metrics.csv", "a") as file:
                    header = "" if file.tell() else ",".join(["step", *numbers]) + "\n"
                    file.write(header + ",".join([str(step), *numbers.values()]) + "\n")
                bar.set_postfix(numbers, refresh=not last)  # the last line is written as the bar closes
            if draw or last:
                nets.eval()
                with torch.no_grad():
                    for name, (x, columns) in pictures(fixed_z).items():
                        save_grid(x, out / name / f"{step:07d}.png", columns)
                nets.train()
            if keep or last:
                save(step, config, nets, optimizers, fixed_z)
            if thin:
                save(step, config, {"generator": nets["generator"]}, {}, fixed_z, f"snapshots/{step:07d}.pt")
            if last and signals:
                tqdm.write(f"stopped after step {step}; go on with --resume {out}", file=sys.stderr)
                sys.exit(128 + signals[0])
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def save(step, config, nets, optimizers, fixed_z, name="checkpoint.pt"):
    """Replace the checkpoint in one move: killed at any moment, or on a full disk, a whole one is left."""
    path, rng = Path(config.out, name), {"cpu": torch.get_rng_state()}
    rng |= {"cuda": torch.cuda.get_rng_state()} if fixed_z.is_cuda else {}
    saved = {"model": config.model, "step": step, "fixed_z": fixed_z, "rng": rng}
    saved["config"] = {name: value for name, value in vars(config).items() if name not in ("out", "resume")}
    saved["networks"] = {name: net.state_dict() for name, net in nets.items()}
    saved["optimizers"] = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:
        torch.save(saved, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def load_checkpoint(config, argv):
    """The checkpoint of the run config.resume, and its flags with argv's; ValueError if they disagree."""
    path = Path(config.resume) / "checkpoint.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if len(saved) != 7 or saved["model"] != config.model:  # `save` writes seven entries
            raise ValueError
        flags = saved["config"] | {"out": str(Path(config.resume)), "device": config.device}
    except Exception as error:  # what a truncated or foreign file raises has no common class
        raise ValueError(f"{path} is missing, damaged or not of {config.model}.py") from error
    config = parse_args(argv, flags)
    for name, value in flags.items():
        now, free = getattr(config, name), name.endswith("_every") or name in ("data_dir", "snapshots")
        if now < value if name == "steps" else now != value and not free:
            raise ValueError(f"--{name.replace('_', '-')} {now}: the run in {config.resume} has {value}")
    return saved, config


def fail(message, code=2):
    """One line on stderr, and out."""
    tqdm.write(f"{DEFAULTS['model']}.py: error: {message}", file=sys.stderr)
    sys.exit(code)


def parse_args(argv=None, saved=None):
    """The flags; `saved`, those of the run that is resumed, take the place of the defaults."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--dataset", default="glyphs", help="a name (README.md, Data) or a folder of pictures")
    flag("--data-dir", default="data", help="where data sets are found, downloaded to and cached")
    flag("--image-size", type=int, default=32, help="pixels; 8, 16, 32, 64, … for a conv network")
    flag("--out", help="the run's folder, runs/<model>-<dataset> unless given")
    flag("--resume", metavar="RUN", help="go on with the run in this folder")
    flag("--steps", type=int, default=20000, help="generator updates in all")
    flag("--batch-size", type=int, help="samples in a batch")
    flag("--z-dim", type=int, help="dimensions of z")
    flag("--width", type=int, help="channels next to the image; layers of an mlp have 8 × width units")
    flag("--network", choices=("conv", "mlp"), default="conv", help="kind of all networks")
    flag("--lr", type=float, help="learning rate")
    flag("--seed", type=int, default=0, help="fixes everything random")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: a GPU if any")
    flag("--log-every", type=int, default=50, help="steps from row to row of metrics.csv")
    flag("--sample-every", type=int, default=500, help="steps from picture to picture")
    flag("--save-every", type=int, default=1000, help="steps from checkpoint to checkpoint")
    flag("--snapshots", type=int, default=0, help="copies of the generator to keep, evenly over the run")
    add_flags(flag)
    parser.set_defaults(**DEFAULTS)
    chosen = parser.parse_args(argv)
    for name, changes in VARIANTS.items():
        parser.set_defaults(**changes.get(getattr(chosen, name), {}))
    parser.set_defaults(**(saved or {}))
    config = parser.parse_args(argv)
    for name, value in vars(config).items():
        if isinstance(value, int | float) and not ABOVE.get(name, 0) < value < 2**63:
            fail(f"--{name.replace('_', '-')} {value}: it takes a number above {ABOVE.get(name, 0)}")
    gpu = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    config.device = gpu if config.device == "auto" else config.device
    if config.device not in ("cpu", gpu):
        fail(f"--device {config.device}: PyTorch finds none on this machine")
    config.out = str(Path(config.out or f"runs/{config.model}-{Path(config.dataset).name}"))
    return config


def main(argv=None):
    """Train as the flags say. A user's mistake is one line and exit code 2; a bug keeps its traceback."""
    config, saved = parse_args(argv), None
    try:
        if config.resume:
            saved, config = load_checkpoint(config, argv)
            if saved["step"] >= config.steps:
                return print(f"{config.out} is finished, with {saved['step']} steps; --steps makes it go on")
        elif Path(config.out, "checkpoint.pt").exists():
            raise ValueError(f"{config.out} holds a run: continue it with --resume, or choose another --out")
        config.shape = [2] if config.dataset in VARIANTS["dataset"] else [3] + 2 * [config.image_size]
        with torch.device("meta"):  # a size that they cannot take is told before the data are read
            networks(config)
        x_train, _ = load_data(config.dataset, config.data_dir, "train", config.image_size, config.device)
        x_test, _ = load_data(config.dataset, config.data_dir, "test", config.image_size, config.device)
        config.shape = list(x_train.shape[1:])
    except (KeyboardInterrupt, OSError, ValueError) as error:
        fail(str(error) or "stopped before the first step")
    try:
        train(config, x_train, x_test, saved)
    except torch.OutOfMemoryError:
        fail(f"memory of {config.device} is full: take a smaller --batch-size or --width, and another --out")
    except (KeyboardInterrupt, OSError) as error:  # no place or no right to write
        fail(f"{str(error) or 'stopped'}; what {config.out} held is whole")


if __name__ == "__main__":
    main()
