"""AGE — Ulyanov, Vedaldi & Lempitsky, "It Takes (Only) Two: Adversarial Generator-Encoder Networks",
2018, https://arxiv.org/abs/1704.02304. The encoder E makes the codes of data fit the prior and those of
samples not; the generator G makes those of its samples fit. Each learns to invert the other:

    max_E min_G  V = Δ(E(G(z)) ‖ prior) − Δ(E(x) ‖ prior)
        E minimises −V + μ E|x − G(E(x))|,  G minimises V + λ E‖z − E(G(z))‖²

Codes and prior are on the unit sphere. Δ is the KL divergence of a diagonal Gaussian, fitted to a batch
of codes, from N(0, I); on the sphere of d dimensions it is at least ½(1/d + log d − 1) for each.

Differs from the paper:
    Δ         a mean over dimensions, as in the authors' code, which has s² where σ should be
    λ         500, of a mean square over dimensions: the authors' 1000, of a mean product
    networks  DCGAN's; z 64, theirs for CelebA; their rate is halved every 40 epochs. The running
              statistics of E's batch norm are of data alone, theirs of samples, too

    python age.py --dataset mnist --z-dim 16
    python age.py --width 16 --z-dim 16 --lr 1e-3 --steps 700    # minutes on a CPU, without a download
    python age.py --resume runs/age-mnist --steps 40000
"""

import csv
import io
import json
import math
import os
import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm, trange

from common import as_float, load_data, sample_batch, save_grid

# Settings

DEFAULTS = {
    "batch_size": 64,
    "z_dim": 64,
    "width": 64,
    "lr": 2e-4,
    "generator_steps": 2,  # so that G can follow: E has no other opponent
    "rec_weight": 10,
    "code_weight": 500,
}
ON_POINTS = {"network": "mlp", "z_dim": 3, "batch_size": 256}  # the sphere's surface has two dimensions
LEAST = {"batch_size": 2, "seed": 0, "z_dim": 2}  # the other numbers have to be above 0


def add_flags(flag):
    """This model's own flags."""
    flag("--generator-steps", type=int, help="generator updates per encoder update")
    flag("--rec-weight", type=float, help="μ, the weight of x's reconstruction in the encoder's loss")
    flag("--code-weight", type=float, help="λ, the weight of z's reconstruction in the generator's loss")


# Networks


def conv_widths(shape, width, growth=2):
    """Channels of a conv net's layers from the image inwards, one for each halving down to 4×4."""
    layers = max(1, round(math.log2(shape[-1] / 4)))
    if len(shape) != 3 or shape[-1] != 4 * 2**layers:
        raise ValueError(f"--image-size {shape[-1]}: conv takes 8, 16, 32, 64, …; --network mlp any")
    return [width * growth**i for i in range(layers)]


class Generator(nn.Sequential):
    """z (N, z_dim) → x (N, C, S, S) in [−1, 1]; `plain`: `width` channels, no batch norm."""

    def __init__(self, shape, z_dim, width, plain=False):
        widths = conv_widths(shape, width, growth=1 if plain else 2)[::-1]
        layers = [nn.Unflatten(1, (-1, 1, 1)), nn.ConvTranspose2d(z_dim, widths[0], 4, bias=plain)]
        for n_in, n_out in pairwise([*widths, shape[0]]):
            layers += [nn.Identity() if plain else nn.BatchNorm2d(n_in), nn.ReLU()]
            layers += [nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1, bias=plain)]
        super().__init__(*layers, nn.Tanh())


class Encoder(nn.Sequential):
    """x (N, C, S, S) → (N, features), `width` channels next to the image; `norm`: batch norm."""

    def __init__(self, shape, features, width, norm):
        widths = conv_widths(shape, width)
        layers = [nn.Conv2d(shape[0], width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n_in, n_out in pairwise(widths):
            layers += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1, bias=not norm)]
            layers += [nn.BatchNorm2d(n_out) if norm else nn.Identity(), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], features))


class Sphere(nn.Module):
    """a (N, d) → a / ‖a‖, on the unit sphere."""

    def forward(self, a):
        return F.normalize(a, dim=1)


def mlp(n_in, n_out, units, layers=3, norm=nn.Identity, slope=0.2):
    """(N, …) → (N, n_out) through `layers` hidden layers of LeakyReLU(slope); slope 0 is a ReLU."""
    hidden = [nn.Flatten()]
    for a, b in pairwise([n_in] + [units] * layers):
        hidden += [nn.Linear(a, b, bias=norm is nn.Identity), norm(b), nn.LeakyReLU(slope)]
    return nn.Sequential(*hidden, nn.Linear(units, n_out))


def init_weights(module):
    """DCGAN's initial weights of a conv network: N(0, 0.02), the batch norm's gains N(1, 0.02)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


# Objective


def kl_to_prior(codes):
    """KL(N(m, s²) ‖ N(0, 1)) = ½(m² + s² − log s² − 1), a mean over dimensions; m, s² of codes (N, d)."""
    mean, variance = codes.mean(0), codes.var(0, correction=0)
    return (mean.square() + variance - variance.log() - 1).mean() / 2


def encoder_loss(x, x_rec, z_hat, z_rec, rec_weight):
    """E minimises Δ(E(x)) − Δ(E(G(z))) + μ E|x − G(E(x))|, a mean over pixels; z_rec is E(G(z))."""
    return kl_to_prior(z_hat) - kl_to_prior(z_rec) + rec_weight * F.l1_loss(x_rec, x)


def generator_loss(z, z_rec, code_weight):
    """G minimises Δ(E(G(z))) + λ E(z − E(G(z)))², a mean over dimensions; z_rec is E(G(z))."""
    return kl_to_prior(z_rec) + code_weight * F.mse_loss(z_rec, z)


# Training


def networks(config):
    """{"generator": z → x, "encoder": x → z on the sphere}; ValueError for a size they cannot take."""
    shape, z_dim, width = config.shape, config.z_dim, config.width
    size, units = math.prod(shape), 8 * width
    if config.network == "mlp":  # without batch norm in E, which would learn nothing
        norm, squash = (nn.BatchNorm1d, nn.Tanh()) if len(shape) == 3 else (nn.Identity, nn.Identity())
        decoder, encoder = mlp(z_dim, size, units, norm=norm, slope=0), mlp(size, z_dim, units)
        generator = nn.Sequential(decoder, squash, nn.Unflatten(1, shape))
    else:
        generator, encoder = Generator(shape, z_dim, width), Encoder(shape, z_dim, width, norm=True)
    nets = {"generator": generator, "encoder": nn.Sequential(encoder, Sphere())}
    # E, too, as from PyTorch's own weights it learnt far less
    return {name: net.apply(init_weights) for name, net in nets.items()}


def draw_z(n, config, device):
    """n draws from the prior, uniform on the unit sphere: (n, z_dim)."""
    return F.normalize(torch.randn(n, config.z_dim, device=device), dim=1)


def generate(nets, z):
    """z (N, z_dim) → x_fake (N, *shape), images in [−1, 1]."""
    return nets["generator"](z)


def encode(nets, x):
    """x (N, *shape), images in [−1, 1] → z_hat (N, z_dim)."""
    return nets["encoder"](x)


def features(nets, x):
    """x (N, *shape) → the encoder's last hidden layer, (N, features)."""
    return nn.Sequential(*list(nets["encoder"][0])[:-1])(x)


def build(config, train_set, test_set):
    """Networks, optimisers, one iteration, and pictures; sets (x, y) as load_data's."""
    device, n, (x_train, _) = torch.device(config.device), config.batch_size, train_set
    nets = nn.ModuleDict(networks(config)).to(device, memory_format=torch.channels_last)
    generator, encoder = nets["generator"], nets["encoder"]
    settings = {"lr": config.lr, "betas": (0.5, 0.999), "fused": True, "capturable": device.type == "cuda"}
    optimizers = {name: torch.optim.Adam(net.parameters(), **settings) for name, net in nets.items()}

    def update(loss, *names):  # these networks; no gradient is computed for the others
        loss.backward(inputs=[weight for name in names for weight in nets[name].parameters()])
        for name in names:
            optimizers[name].step()
            optimizers[name].zero_grad()

    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]

    def encode_fakes(x_fake):
        for norm in norms:  # its running statistics, those of eval mode, are of data alone
            norm.track_running_stats = False
        z_rec = encoder(x_fake)
        for norm in norms:
            norm.track_running_stats = True
        return z_rec

    def encoder_step():
        x = sample_batch(x_train, n, device)
        with torch.no_grad():
            x_fake = generator(draw_z(n, config, device))
        z_hat, z_rec = encoder(x), encode_fakes(x_fake)
        x_rec = generator(z_hat)
        update(encoder_loss(x, x_rec, z_hat, z_rec, config.rec_weight), "encoder")
        return {
            "KL(E(x))": kl_to_prior(z_hat.detach()),
            "KL(E(G(z)))": kl_to_prior(z_rec.detach()),
            "reconstruction": F.l1_loss(x_rec.detach(), x),
        }

    def generator_step():
        z = draw_z(n, config, device)
        z_rec = encode_fakes(generator(z))
        update(generator_loss(z, z_rec, config.code_weight), "generator")
        return {"code_error": F.mse_loss(z_rec.detach(), z)}

    def iteration():
        metrics = encoder_step()
        for _ in range(config.generator_steps):
            metrics |= generator_step()
        return metrics

    def pictures(z):
        x = as_float(test_set[0][: len(z) // 2]).to(device)
        pairs = torch.stack([x, generate(nets, encode(nets, x))], dim=1)
        return {"samples": (generate(nets, z), 8), "reconstructions": (pairs, 8)}

    return nets, optimizers, iteration, pictures


# Running: the loop and the command line, the same in every file

POINTS = ("ring", "grid", "swissroll")
MAY_CHANGE = {"data_dir", "steps", "log_every", "sample_every", "save_every"}  # on resuming
PARTS = {"model", "step", "config", "networks", "optimizers", "rng", "fixed_z"}  # of a checkpoint


def train(config, nets, optimizers, iteration, pictures, saved, capture):
    """Call `iteration` up to config.steps; log, draw and save into config.out."""
    out, device, first = Path(config.out), torch.device(config.device), 0
    torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    fixed_z = draw_z(64 if len(config.shape) == 3 else 2500, config, device)
    if saved:
        first, fixed_z = restore(saved, nets, optimizers, device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank > 0:  # other batches; process 0 alone logs and saves
        torch.manual_seed(config.seed + first + 10**6 * rank)
    for weight in nets.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: average(weight.grad))
    if capture:  # a graph cannot be recorded on the default stream
        torch.cuda.set_stream(torch.cuda.Stream())
    bad_since = torch.tensor(math.inf, device=device)  # since when a number is not finite
    bar = trange(first + 1, config.steps + 1, initial=first, total=config.steps, disable=rank > 0 or None)
    with claim(out, first) if rank == 0 else nullcontext(), noted_signals() as signals:
        if rank == 0 and not saved:
            save(0, config, nets, optimizers, fixed_z)
        for step in bar:
            set_rate(optimizers, config, step)
            if capture and step == first + 4:  # all state that it needs is there
                iteration = recorded(iteration)
            metrics = iteration()
            values = torch.stack(list(metrics.values()))
            average(values)
            bad_since = torch.where(values.isfinite(), bad_since, bad_since.clamp(max=step))
            last = step == config.steps or bool(signals)
            log = step % config.log_every == 0
            draw = step % config.sample_every == 0 or last
            keep = step % config.save_every == 0 or last
            if rank > 0 or not (log or draw or keep):
                continue  # the host waits for the device only below
            bad, name = min(zip(bad_since.tolist(), metrics, strict=True))
            if bad < math.inf:
                fail(f"{name} was not finite at step {bad:.0f}; the checkpoint is older", 1)
            if log:
                numbers = zip(metrics, values.tolist(), strict=True)
                row = {"step": step} | {name: f"{value:.6g}" for name, value in numbers}
                with open(out / "metrics.csv", "a") as file:
                    table = csv.DictWriter(file, row, lineterminator="\n")
                    if file.tell() == 0:
                        table.writeheader()
                    table.writerow(row)
                bar.set_postfix(row)
                if bar.disable:  # there is no terminal
                    say(", ".join(f"{name} {value}" for name, value in row.items()))
            if draw:
                nets.eval()
                with torch.no_grad():
                    for name, (x, columns) in pictures(fixed_z).items():
                        save_grid(x, out / name / f"{step:07d}.png", columns)
                nets.train()
            if keep:
                save(step, config, nets, optimizers, fixed_z)
            if last and signals:
                fail(f"stopped after step {step}; --resume {out} goes on", 128 + signals[0])


def average(tensor):
    """Its mean over the processes of torchrun, in place."""
    if dist.is_initialized():
        total = tensor.contiguous()  # channels_last cannot be sent
        dist.all_reduce(total)
        tensor.copy_(total / dist.get_world_size())


def recorded(iteration):
    """A function that replays `iteration` as a CUDA graph, into the same tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = iteration()  # recorded, not executed

    def replay():
        graph.replay()
        return results

    return replay


def set_rate(optimizers, config, step):
    """Falls exponentially from --decay-start on, to a hundredth at --decay-end."""
    late = (step - config.decay_start) / max(1, config.decay_end - config.decay_start)
    for optimizer in optimizers.values():
        rate = optimizer.defaults["lr"] * 0.01 ** min(max(late, 0), 1)
        for group in optimizer.param_groups:
            if group["capturable"]:  # a graph reads this tensor
                rate = torch.as_tensor(group["lr"], device=config.device).fill_(rate)
            group["lr"] = rate


@contextmanager
def noted_signals():
    """Inside, Ctrl-C and SIGTERM only add their number to this list."""
    signals, kinds = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda kind, frame: signals.append(kind)) for kind in kinds]
    try:
        yield signals
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def claim(out, step):
    """Keep other processes out of `out` until the returned file is closed."""
    out.mkdir(parents=True, exist_ok=True)
    copy = open(out / Path(__file__).name, "a")
    try:
        import fcntl

        fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is writing into {out}")
    except (ImportError, OSError):
        pass  # neither Windows nor every network drive has such locks
    Path(copy.name).write_bytes(Path(__file__).read_bytes())
    table = out / "metrics.csv"
    if table.exists():  # a killed run logged more than it saved, perhaps half a row
        header, *rows = table.read_text("utf-8-sig").splitlines() or [""]
        cells = [row.split(",") for row in rows]
        kept = [c for c in cells if not c[0].isdecimal() or len(c) > 1 and int(c[0]) <= step]
        table.write_text("\n".join([header, *map(",".join, kept), ""]) if kept else "")
    return copy


def save(step, config, nets, optimizers, fixed_z):
    """Replace the checkpoint; a kill or a full disk leaves a whole one."""
    for name, net in nets.items():  # the losses are from before the update
        moments = [moment for state in optimizers[name].state.values() for moment in state.values()]
        if not all(part.isfinite().all() for part in [*net.state_dict().values(), *moments]):
            fail(f"{name} was not finite after step {step}; the checkpoint is older", 1)
    cuda_rng = torch.cuda.get_rng_state() if fixed_z.is_cuda else None
    saved = {
        "model": Path(__file__).stem,
        "step": step,
        "config": {k: v for k, v in vars(config).items() if k not in ("out", "resume")},
        "networks": {name: net.state_dict() for name, net in nets.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "rng": {"cpu": torch.get_rng_state(), "cuda": cuda_rng},
        "fixed_z": fixed_z,
    }
    Path(config.out, "config.json").write_text(json.dumps(saved["config"], indent=1) + "\n")
    path, content = Path(config.out, "checkpoint.pt"), io.BytesIO()
    torch.save(saved, content)  # in memory, so that a full disk is an OSError
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    finally:
        Path(f"{path}.tmp").unlink(missing_ok=True)


def restore(saved, nets, optimizers, device):
    """Put back all that the next step depends on; the step, and the pictures' z."""
    for name, net in nets.items():
        net.load_state_dict(saved["networks"][name])
    for name, optimizer in optimizers.items():  # the moments alone
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["optimizers"][name]["state"]})
    torch.set_rng_state(saved["rng"]["cpu"])
    if device.type == "cuda" and saved["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(saved["rng"]["cuda"])
    return saved["step"], saved["fixed_z"].to(device)


def load_checkpoint(config, argv):
    """The checkpoint of config.resume, and its flags with those of argv."""
    path, name = Path(config.resume, "checkpoint.pt"), Path(__file__).name
    content = io.BytesIO(path.read_bytes())
    try:
        saved = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises has no common class
        raise ValueError(f"{path} is damaged") from error
    if not isinstance(saved, dict) or saved.keys() != PARTS:
        raise ValueError(f"{path} was not written by {name}")
    if saved["model"] != Path(__file__).stem:
        raise ValueError(f"{path} was written by {saved['model']}.py, not {name}")
    flags = saved["config"] | {"out": str(path.parent), "device": config.device}
    config = parse_args(argv, flags)
    for name in flags.keys() - MAY_CHANGE:
        if getattr(config, name) != flags[name]:
            raise ValueError(f"--{name.replace('_', '-')}: {path.parent} has {flags[name]}")
    return saved, config


def say(text):
    """A line on stderr, unless its reader has gone."""
    try:
        tqdm.write(str(text), file=sys.stderr)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")


def fail(message, code=2):
    """One line on stderr, and out."""
    say(f"{Path(__file__).name}: {message}")
    sys.exit(code)


def parse_args(argv=None, saved=None):
    """The flags; unless given, the resumed run's or this model's defaults."""
    description, path = (__doc__ or "").split("\n")[0], os.path.expanduser
    parser = ArgumentParser(description=description, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--dataset", type=path, default="glyphs", help="a name or a folder of pictures")
    flag("--data-dir", type=path, default="data", help="where data sets are kept")
    flag("--image-size", type=int, default=32, help="pixels; conv: 8, 16, 32, 64, …")
    flag("--out", type=path, help="runs/<file>-<dataset> unless given")
    flag("--resume", type=path, metavar="RUN", help="go on with this run")
    flag("--steps", type=int, default=20000, help="generator updates")
    flag("--batch-size", type=int, help="samples per batch")
    flag("--z-dim", type=int, help="dimensions of z")
    flag("--width", type=int, help="channels next to the image; mlp: 8 × width units")
    flag("--network", choices=("conv", "mlp"), default="conv", help="kind of networks")
    flag("--lr", type=float, help="learning rate")
    flag("--decay-start", type=int, default=10**9, help="step at which it starts to fall")
    flag("--decay-end", type=int, default=10**9, help="step at which it is a hundredth")
    flag("--seed", type=int, default=0, help="of everything random")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: a GPU")
    flag("--log-every", type=int, default=50, help="steps between rows of metrics.csv")
    flag("--sample-every", type=int, default=500, help="steps between pictures")
    flag("--save-every", type=int, default=1000, help="steps between checkpoints")
    add_flags(flag)
    parser.set_defaults(**DEFAULTS)
    if parser.parse_args(argv).dataset in POINTS:
        parser.set_defaults(**ON_POINTS)
    parser.set_defaults(**(saved or {}))
    config = parser.parse_args(argv)
    for name, value in vars(config).items():
        given, least = f"--{name.replace('_', '-')} {value}", LEAST.get(name, 1e-300)
        if isinstance(value, int | float) and not least <= value < 2**63:
            fail(f"{given} is too {'small' if value < least else 'large'}")
        if value in ("", []) or str(value).startswith("~"):  # [] is argparse's for --flag=--
            fail(f"{given.strip()} is no value")
    gpu = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    config.device = gpu if config.device == "auto" else config.device
    if config.device not in ("cpu", gpu):
        fail(f"--device {config.device}: PyTorch finds none on this machine")
    config.out = str(Path(config.out or f"runs/{Path(__file__).stem}-{Path(config.dataset).name}"))
    return config


def main(argv=None):
    """Train as the flags say; a user's mistake is one line and exit code 2."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed, as by 2>&-
    config, saved, parts = parse_args(argv), None, None
    try:
        if config.resume:
            saved, config = load_checkpoint(config, argv)
            if saved["step"] >= config.steps:
                fail(f"{config.out} is finished, at step {saved['step']}; more --steps go on", 0)
        elif any(Path(config.out).glob("*")):
            raise ValueError(f"{config.out} is not empty: --resume it, or choose another --out")
        if dist.is_torchelastic_launched():
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group()
            dist.barrier()  # all have seen what was in the folder
        size, config.classes = config.image_size, 10
        config.shape = [2] if config.dataset in POINTS else [3, size, size]
        with torch.device("meta"):  # finds a wrong size before the data are read
            networks(config)
        x, y = load_data(config.dataset, config.data_dir, "train", size, config.device)
        test_set = load_data(config.dataset, config.data_dir, "test", size, config.device)
        config.shape, config.classes = list(x.shape[1:]), None if y is None else int(y.max()) + 1
        if config.device == "cpu":
            say("no GPU: --width 16 --steps 1000 takes minutes, the defaults hours")
        torch.manual_seed(config.seed)
        parts = build(config, (x, y), test_set)
        train(config, *parts, saved, capture=x.is_cuda and not dist.is_initialized())
    except KeyboardInterrupt:
        fail("stopped; what was saved is whole", 130)
    except (OSError, ValueError) as error:
        if parts and isinstance(error, ValueError):  # a bug
            raise
        fail(error)
    except (MemoryError, torch.OutOfMemoryError):
        fail(f"memory of {config.device} is full: take a smaller --batch-size, --width")


if __name__ == "__main__":
    main()
