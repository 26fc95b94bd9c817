"""GM-WAE — Gaujac, Feige & Barber, "Gaussian mixture models with Wasserstein distance", 2018
https://arxiv.org/abs/1806.04465: a Wasserstein auto-encoder whose prior is a mixture of K fixed Gaussians,

    min_{G,E}  E_x Σ_k q(k|x) E_{q(z|k,x)} c(x, G(z)) + λ MMD(q(z), p(z))     p(z) = 1/K Σ_k N(μ_k, σ²I)

The sum over k is exact, and nothing is asked of k itself: only q(z) = E_x Σ_k q(k|x) q(z|k,x) has to match.
With --objective vae the same model is trained on its evidence lower bound, the paper's comparison.

Differs from the paper, here its authors' code, first and later; our settings were chosen with MNIST's labels:
    prior, λ     σ 0.236, λ 750, as later; with the first, √(1/8) and 200, components were lost here
    networks     DCGAN's for G and q(k|x); q(z|k,x), an mlp for each k, has --width units (theirs 16, 32)
    kernel       C = z_dim/2 times the scales, as later; first 2 z_dim
    pre-training 1000 steps of Adam at 5e-3; theirs 1500, 10000
    optimiser    Adam 5e-4 (0.5, 0.999), batch 64, one sample of z for each x and k; theirs 8e-4, 1e-4; 128; 5

    python gm_wae.py --network mlp --width 16 --steps 2000    # minutes on a CPU, without a download
    python gm_wae.py --dataset mnist --network mlp
    python gm_wae.py --dataset mnist --network mlp --objective vae --init runs/gm_wae-mnist --out runs/gm_vae
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


def imq_kernel(a, b, c):
    """Inverse multiquadratics, Σ cs/(cs + ‖a_i − b_j‖²) over scales s: (…, n, d), (…, m, d) → (…, n, m)."""
    squared = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    return sum(c * s / (c * s + squared) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))


def mmd(z_q, w_q, z_p, w_p):
    """E k(z, z′) + E k(y, y′) − 2 E k(z, y) of z ~ q, y ~ p, unbiased; points (n, K, d), weights (n, K)."""
    n, c = len(z_q), z_q.shape[2] / 2

    def total(z, w, y, v):  # Σ_ij w_i v_j k(z_i, y_j), in each row if there are rows
        return (w * (imq_kernel(z, y, c) @ v.unsqueeze(-1)).squeeze(-1)).sum()

    (q, u), (p, v) = ((z.flatten(0, 1), w.flatten()) for z, w in ((z_q, w_q), (z_p, w_p)))
    qq = total(q, u, q, u) - total(z_q, w_q, z_q, w_q)  # the pairs in a row, of one x, are not independent
    pp = total(p, v, p, v) - total(z_p, w_p, z_p, w_p)
    return (qq + pp) / (n * (n - 1)) - 2 * total(q, u, p, v) / n**2


def wae_loss(x, x_rec, q, z_q, z_p, mmd_weight):
    """E_x Σ_k q(k|x) c(x, G(z_k)) + λ MMD(q(z), p(z)), z_k ~ q(z|k,x).

    x (n, …), x_rec (n, K, …), q (n, K), z_q and z_p (n, K, d), the latter one draw of each p(z|k) in a row.
    c is the squared error of (x + 1)/2, summed over pixels and channels: it grows with the image.
    """
    errors = ((x[:, None] - x_rec) / 2).square().flatten(2).sum(2)
    cost, distance = (q * errors).sum(1).mean(), mmd(z_q, q, z_p, torch.full_like(q, 1 / q.shape[1]))
    return {"loss": cost + mmd_weight * distance, "reconstruction": cost, "mmd": distance}


def elbo_loss(x, logits, log_q, mean, log_var, means, std):
    """−ELBO = E_x Σ_k q(k|x) [−log p(x|z_k) + KL(q(z|k,x)‖p(z|k))] + KL(q(k|x)‖Uniform).

    p(x|z) is Bernoulli's of (x + 1)/2, by G's logits (n, K, …), one z_k ~ q(z|k,x) each. x (n, …), log q(k|x)
    (n, K), the mean and log-variance of q(z|k,x) (n, K, d), the means of p(z|k) (K, d) and its std.
    """
    q, target = log_q.exp(), (x[:, None] + 1) / 2
    errors = (nn.functional.softplus(logits) - target * logits).flatten(2).sum(2)
    kl = ((log_var.exp() + (mean - means).square()) / std**2 - 1 - log_var + 2 * math.log(std)).sum(2) / 2
    terms = {"reconstruction": errors, "kl_z": kl, "kl_k": log_q + math.log(q.shape[1])}
    terms = {name: (q * term).sum(1).mean() for name, term in terms.items()}
    return {"loss": sum(terms.values())} | terms


def moment_loss(mean, log_var, means, std):
    """How far mean and variance of each q(z|k) = E_x q(z|k,x) are from those of p(z|k): squared, summed."""
    variance = log_var.exp().mean(0) + mean.var(0, correction=0)
    return (mean.mean(0) - means).square().sum() + (variance - std**2).square().sum()


# Training


def component_means(config, device=None):
    """μ_k, (K, z_dim), at distances √2: unit vectors, or for K = z_dim + 1 a regular simplex around 0."""
    z_dim, components = config.z_dim, config.components or config.z_dim
    if components > z_dim + 1:
        raise ValueError(f"--components {components}: --z-dim {z_dim} takes at most {z_dim + 1}")
    means = torch.eye(components, z_dim, device=device)
    if components > z_dim:
        means[-1] = (1 - math.sqrt(1 + z_dim)) / z_dim
        means -= means.mean(0)
    return means


def networks(config):
    """{"generator": z → x, "encoder": x → q(z|k,x) for each k, "classifier": x → q(k|x)}; or ValueError."""
    shape, size, z_dim, units = config.shape, math.prod(config.shape), config.z_dim, 8 * config.width
    components, image = len(component_means(config)), len(config.shape) == 3
    squash, norm = (nn.Tanh(), nn.BatchNorm1d) if image else (nn.Identity(), nn.Identity)
    if config.objective == "vae" and not image:
        raise ValueError("--objective vae has a likelihood of pixels, none of points; those take wae")
    if config.network == "mlp":
        generator = nn.Sequential(mlp(z_dim, size, units, norm=norm, slope=0), nn.Unflatten(1, shape), squash)
        classifier = mlp(size, components, units, norm=norm, slope=0)
    else:
        generator = Generator(shape, z_dim, config.width).apply(init_weights)
        classifier = Encoder(shape, components, config.width, norm=True)
    parts = [mlp(size, 2 * z_dim, config.width, layers=1, norm=norm, slope=0) for _ in range(components)]
    return {"generator": generator, "encoder": nn.ModuleList(parts), "classifier": classifier}


def draw_z(n, config, device, component=None):
    """n draws from the prior, (n, z_dim): from the mixture, or from its component 0 … K − 1."""
    means = component_means(config, device)
    k = torch.randint(len(means), (n,), device=device) if component is None else component
    return means[k] + config.prior_std * torch.randn(n, config.z_dim, device=device)


def generate(nets, z, logits=False):
    """z (N, z_dim) → x_fake (N, *shape), images in [−1, 1], or the logits of (x_fake + 1)/2."""
    # G ends in tanh(a), and (tanh(a) + 1)/2 = sigmoid(2a)
    return 2 * nn.Sequential(*list(nets["generator"])[:-1])(z) if logits else nets["generator"](z)


def component_probabilities(nets, x):
    """x (N, *shape) → q(k|x), (N, K)."""
    return nets["classifier"](x).softmax(1)


def component_codes(nets, x):
    """x (N, *shape) → mean and log-variance of q(z|k,x), each (N, K, z_dim)."""
    return torch.stack([part(x) for part in nets["encoder"]], dim=1).chunk(2, dim=2)


def encode(nets, x):
    """x (N, *shape), images in [−1, 1] → z_hat (N, z_dim), the mean of q(z|k,x) for the most probable k."""
    return component_codes(nets, x)[0][torch.arange(len(x)), nets["classifier"](x).argmax(1)]


def features(nets, x):
    """x (N, *shape) → the last hidden layer behind q(k|x), (N, features)."""
    return nn.Sequential(*list(nets["classifier"])[:-1])(x)


def train(config, x_train, x_test, saved=None):
    """Train on x_train, as load_data gives it, into config.out, from the checkpoint `saved` if any."""
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    nets = nn.ModuleDict(networks(config)).to(device, memory_format=torch.channels_last)
    means, std, vae = component_means(config, device), config.prior_std, config.objective == "vae"
    noise = torch.randn(8 if len(config.shape) == 3 else 500, 1, config.z_dim, device=device)  # for pictures
    settings = {"lr": config.lr, "betas": (0.5, 0.999), "capturable": device.type == "cuda", "fused": True}
    optimizers = {name: torch.optim.Adam(net.parameters(), **settings) for name, net in nets.items()}

    if saved is None and config.init:
        try:
            weights = torch.load(Path(config.init, "checkpoint.pt"), "cpu", weights_only=True)["networks"]
            for name, net in nets.items():
                net.load_state_dict(weights[name])
        except Exception:  # what a truncated or foreign file raises has no common class
            fail(f"--init {config.init}: checkpoint.pt is missing, damaged or of networks unlike these")
    elif saved is None:  # each q(z|k) to p(z|k), a phase of its own before step 0
        optimizer = torch.optim.Adam(nets["encoder"].parameters(), 5e-3)
        for _ in tqdm(range(config.pretrain_steps), "pre-training", disable=None):
            x = sample_batch(x_train, config.batch_size, device)
            moment_loss(*component_codes(nets, x), means, std).backward()
            optimizer.step()
            optimizer.zero_grad()

    def iteration():
        x = sample_batch(x_train, config.batch_size, device)
        log_q, (mean, log_var) = nets["classifier"](x).log_softmax(1), component_codes(nets, x)
        usage, copies = log_q.exp().mean(0), config.z_samples  # copies of each k, with a sample of z each
        log_q, centres = log_q.repeat(1, copies) - math.log(copies), means.repeat(copies, 1)
        mean, log_var = mean.repeat(1, copies, 1), log_var.repeat(1, copies, 1)
        z_q = mean + (log_var / 2).exp() * torch.randn_like(mean)
        x_rec = generate(nets, z_q.flatten(0, 1), logits=vae).unflatten(0, z_q.shape[:2])
        if vae:
            values = elbo_loss(x, x_rec, log_q, mean, log_var, centres, std)
        else:
            z_p = centres + std * torch.randn_like(z_q)
            values = wae_loss(x, x_rec, log_q.exp(), z_q, z_p, config.mmd_weight)
        values["loss"].backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        values |= {"usage_min": usage.min(), "usage_max": usage.max()}
        return {name: value.detach() for name, value in values.items()}

    def pictures(z):
        x = as_float(x_test[: len(z) // 2]).to(device)
        pairs = torch.stack([x, generate(nets, encode(nets, x))], dim=1)
        grids = {"samples": (generate(nets, z), 8), "reconstructions": (pairs, 8)}
        for name, scale in {"components": 1, "components-half": 0.5}.items():  # a column for each k
            x_k = generate(nets, (means + scale * std * noise).flatten(0, 1))
            grids[name] = (x_k.unflatten(0, (-1, len(means))), len(means))
        return grids

    run(config, nets, optimizers, iteration, pictures, saved, device, x_train.is_cuda)


# Running: this model's defaults and flags; from `run` on the same in every model file

DEFAULTS = {"model": "gm_wae", "prior": "mixture", "batch_size": 64, "z_dim": 10, "width": 32, "lr": 5e-4}
DEFAULTS |= {"objective": "wae", "prior_std": 0.236, "mmd_weight": 750, "pretrain_steps": 1000}
TOY = {"network": "mlp", "z_dim": 2, "batch_size": 256, "components": 3, "mmd_weight": 10}
VARIANTS = {"dataset": {"ring": TOY, "grid": TOY, "swissroll": TOY}}  # what else they change
ABOVE = {"batch_size": 1, "seed": -1, "snapshots": -1, "pretrain_steps": -1}  # the others above 0


def add_flags(flag):
    """The model's own flags."""
    flag("--objective", choices=("wae", "vae"), help="vae: the evidence lower bound, for images")
    flag("--components", type=int, help="K, at most z-dim + 1; as many as z has dimensions unless given")
    flag("--prior-std", type=float, help="σ of each component; their means are √2 apart")
    flag("--mmd-weight", type=float, help="λ, the weight of the MMD")
    flag("--z-samples", type=int, default=1, help="samples of z for each x and k")
    flag("--pretrain-steps", type=int, help="steps before step 0 that take each q(z|k) to p(z|k)")
    flag("--init", metavar="RUN", help="start from another run's networks, without pre-training")


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
