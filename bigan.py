"""BiGAN — Donahue, Krähenbühl & Darrell, "Adversarial Feature Learning", 2017
https://arxiv.org/abs/1605.09782; the same objective as ALI's, https://arxiv.org/abs/1606.00704

The discriminator tells two joint distributions apart: data with their codes, and samples with their z. Where
it cannot, generator and encoder are each other's inverse, though no reconstruction term says so:

    min_{G,E} max_D  V = E_x log D(x, E(x)) + E_z log(1 − D(G(z), z))

D is the sigmoid of the discriminator's logit. G and E minimise −E log(1 − D(x, E(x))) − E log D(G(z), z), V
with the labels swapped. All three take one step at once, by the gradients of one forward pass.

Differs from the paper:
    mlp          --network mlp is the paper's for MNIST, but for 32×32 pixels, in [−1, 1] for E, biases before
                 the norm, and PyTorch's initial weights, of the same spread (0.02 at 1024 units)
    conv         DCGAN's networks, weights N(0, 0.02); D: a tower for x, one for z, and an mlp over both
    batch norm   evaluated with running averages; the authors estimate its statistics anew
    decay        step by step; there from epoch to epoch

    python bigan.py --dataset mnist --network mlp --steps 187600
    python bigan.py --network mlp --width 64 --steps 3000    # minutes on a CPU, without a download
"""

import json
import math
import os
import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from functools import partial
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


class Joint(nn.Module):
    """(x, z) → a score (N,), from features of x, of z and, which makes E and G align early, their product."""

    def __init__(self, x_tower, z_dim, units):
        super().__init__()
        self.x_tower, self.z_tower = x_tower, mlp(z_dim, units, units, layers=1)
        self.head = nn.Sequential(mlp(3 * units, 1, units, layers=2), nn.Flatten(0))

    def forward(self, x, z):
        a, b = self.x_tower(x), self.z_tower(z)
        sides = nn.functional.leaky_relu(torch.cat([a, b], dim=1), 0.2)
        return self.head(torch.cat([sides, a * b], dim=1))


class JointMLP(nn.Sequential):
    """(x, z) → second([first(x), z]): z adds a linear term to the second of two layers. Without z, x is z."""

    def forward(self, x, z=None):  # x in [0, 1]: a pixel that is always black moves no weight of the first
        return self[1](torch.cat([self[0]((x + 1) / 2), x if z is None else z], dim=1))


class Squash(nn.Sigmoid):
    """a → 2σ(a) − 1, the sigmoid in the range of images and codes."""

    def forward(self, a):
        return 2 * super().forward(a) - 1


def mlp(n_in, n_out, units, layers=3, norm=nn.Identity, slope=0.2):
    """(N, …) → (N, n_out) through `layers` hidden layers of LeakyReLU(slope); slope 0 is a ReLU."""
    hidden = [nn.Flatten()]
    for a, b in pairwise([n_in] + [units] * layers):
        hidden += [nn.Linear(a, b), norm(b), nn.LeakyReLU(slope)]
    return nn.Sequential(*hidden, nn.Linear(units, n_out))


# Objective


def discriminator_loss(d_real, d_fake):
    """D maximises V = E log D(x, E(x)) + E log(1 − D(G(z), z)): minimise its negative. Logits are (N,)."""
    return F.softplus(-d_real).mean() + F.softplus(d_fake).mean()


def generator_encoder_loss(d_real, d_fake):
    """G and E minimise −E log(1 − D(x, E(x))) − E log D(G(z), z), with swapped labels. Logits are (N,)."""
    return F.softplus(d_real).mean() + F.softplus(-d_fake).mean()


# Training


def networks(config):
    """{"generator": z → x, "encoder": x → z, "discriminator": (x, z) → D}; ValueError for a wrong size."""
    shape, size, z_dim, units = config.shape, math.prod(config.shape), config.z_dim, 8 * config.width
    if config.network == "mlp":
        bare = partial(nn.BatchNorm1d, affine=False)  # without gain and bias
        norm, squash = (bare, Squash()) if len(shape) == 3 else (nn.Identity, nn.Identity())
        to_x = nn.Sequential(mlp(units + z_dim, size, units, 1, norm, 0), squash, nn.Unflatten(1, shape))
        generator = JointMLP(mlp(z_dim, units, units, 1, norm, 0)[:-1], to_x)
        encoder = nn.Sequential(*mlp(size, units, units, 1)[:-1], *mlp(units, z_dim, units, 1, norm))
        to_logit = nn.Sequential(mlp(units + z_dim, 1, units, 1, norm), nn.Flatten(0))
        joint = JointMLP(mlp(size, units, units, 1)[:-1], to_logit)
    else:
        generator = Generator(shape, z_dim, config.width)
        encoder = Encoder(shape, z_dim, config.width, norm=True)
        joint = Joint(Encoder(shape, 2 * units, config.width, norm=True), z_dim, 2 * units)
        for weight in nn.ModuleList((generator, encoder, joint)).parameters():
            if weight.dim() > 1:  # neither a bias nor the gain of a norm
                nn.init.normal_(weight, 0, 0.02)
    return {"generator": generator, "encoder": nn.Sequential(encoder, Squash()), "discriminator": joint}


def draw_z(n, config, device):
    """n draws from the prior U(−1, 1), each number by itself: (n, z_dim)."""
    return 2 * torch.rand(n, config.z_dim, device=device) - 1


def generate(nets, z):
    """z (N, z_dim) → x_fake (N, *shape), images in [−1, 1]."""
    return nets["generator"](z)


def encode(nets, x):
    """x (N, *shape), images in [−1, 1] → z_hat (N, z_dim)."""
    return nets["encoder"](x)


def features(nets, x):
    """x (N, *shape) → the encoder's last hidden layer, (N, features)."""
    return nn.Sequential(*list(nets["encoder"][0])[:-1])(x)


def train(config, x_train, x_test, saved=None):
    """Train on x_train, as load_data gives it, into config.out, from the checkpoint `saved` if any."""
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    nets = nn.ModuleDict(networks(config)).to(device, memory_format=torch.channels_last)
    generator, encoder, discriminator = nets["generator"], nets["encoder"], nets["discriminator"]
    settings = {"betas": (0.5, 0.999), "weight_decay": config.weight_decay, "fused": True}
    settings |= {"lr": torch.tensor(config.lr, device=device), "capturable": device.type == "cuda"}
    optimizers = {name: torch.optim.Adam(net.parameters(), **settings) for name, net in nets.items()}

    def update(loss, *names):  # these networks; the others get no gradient, nor the work of one
        loss.backward(inputs=[weight for name in names for weight in nets[name].parameters()])
        for name in names:
            optimizers[name].step()
            optimizers[name].zero_grad()

    def iteration():
        for optimizer in optimizers.values():
            for state in [*optimizer.state.values()][:1]:  # Adam counts the steps, on the device
                late = (state["step"] - config.decay_start) / max(1, config.decay_end - config.decay_start)
                optimizer.param_groups[0]["lr"].copy_(config.lr * 0.01 ** late.clamp(0, 1))
        x, z = sample_batch(x_train, config.batch_size, device), draw_z(config.batch_size, config, device)
        d_real, d_fake = discriminator(x, encoder(x)), discriminator(generator(z), z)
        d_loss, loss = discriminator_loss(d_real, d_fake), generator_encoder_loss(d_real, d_fake)
        d_loss.backward(inputs=[*discriminator.parameters()], retain_graph=True)  # before any update
        update(loss, "generator", "encoder")
        optimizers["discriminator"].step()
        optimizers["discriminator"].zero_grad()
        means = {"D(x)": d_real.detach().sigmoid().mean(), "D(G(z))": d_fake.detach().sigmoid().mean()}
        return means | {"discriminator_loss": d_loss.detach(), "generator_encoder_loss": loss.detach()}

    def pictures(z):
        x = as_float(x_test[: len(z) // 2]).to(device)
        pairs = torch.stack([x, generate(nets, encode(nets, x))], dim=1)
        return {"samples": (generate(nets, z), 8), "reconstructions": (pairs, 8)}

    run(config, nets, optimizers, iteration, pictures, saved, device, x_train.is_cuda)


# Running: this model's defaults and flags; from `run` on the same in every model file

DEFAULTS = {"model": "bigan", "prior": "uniform", "batch_size": 128, "z_dim": 50, "width": 64, "lr": 2e-4}
DEFAULTS |= {"weight_decay": 2.5e-5, "decay_start": 93800, "decay_end": 187600}  # 200 and 400 epochs of MNIST
TOY = {"network": "mlp", "z_dim": 2, "batch_size": 256, "width": 64}  # as in WGAN-GP's toy script
VARIANTS = {"network": {"mlp": {"width": 128}}, "dataset": {"ring": TOY, "grid": TOY, "swissroll": TOY}}
ABOVE = {"batch_size": 1, "seed": -1, "snapshots": -1}  # all numbers have to be above 0, but these


def add_flags(flag):
    """The model's own flags."""
    flag("--decay-start", type=int, help="steps before the learning rate decays")
    flag("--decay-end", type=int, help="steps after which it is a hundredth of --lr")


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
