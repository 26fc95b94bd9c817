"""GM-WAE — Gaujac, Feige & Barber, "Gaussian mixture models with Wasserstein distance", 2018
https://arxiv.org/abs/1806.04465; a Wasserstein auto-encoder, its prior a mixture of K Gaussians:

    min_{G,E}  E_x Σ_k q(k|x) E_{q(z|k,x)} c(x, G(z)) + λ MMD(q(z), p(z)),  p(z) = 1/K Σ_k N(μ_k, σ²I)

The sum over k is exact. Nothing is asked of k itself: only q(z) = E_x Σ_k q(k|x) q(z|k,x) has to
match. With --objective vae the same model is trained on its evidence lower bound, for comparison.

Differs from the paper, here its authors' code, first and later; ours chosen with MNIST's labels:
    σ, λ, c      0.236, 750, z_dim/2, as later; the first, √(1/8), 200, 2 z_dim, lost components
    networks     DCGAN's for G and q(k|x); q(z|k,x), an mlp for each k, has 32 units, first 16
    training     Adam 5e-4, batch 64, one z for each x and k; theirs 8e-4, later 1e-4, 128, 5
    pre-training 1000 steps; theirs 1500, later 10000

    python gm_wae.py --network mlp --width 16 --steps 2000    # minutes on a CPU, no download
    python gm_wae.py --dataset mnist --network mlp
    python gm_wae.py --dataset mnist --network mlp --objective vae --init runs/gm_wae-mnist --out runs/gm_vae
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
from torch import nn
from tqdm import tqdm, trange

from common import as_float, load_data, sample_batch, save_grid

# Settings

DEFAULTS = {
    "batch_size": 64,
    "z_dim": 10,
    "width": 32,
    "lr": 5e-4,
    "objective": "wae",
    "prior_std": 0.236,
    "mmd_weight": 750,
    "pretrain_steps": 1000,
}
ON_POINTS = {"network": "mlp", "z_dim": 3, "batch_size": 256, "mmd_weight": 10}
LEAST = {"batch_size": 2, "seed": 0, "pretrain_steps": 0}  # the other numbers have to be above 0


def add_flags(flag):
    """This model's own flags."""
    flag("--objective", choices=("wae", "vae"), help="vae: the evidence lower bound, for images")
    flag("--components", type=int, help="K, at most --z-dim; --z-dim unless given")
    flag("--prior-std", type=float, help="σ of each component; their means are √2 apart")
    flag("--mmd-weight", type=float, help="λ, the weight of the MMD")
    flag("--pretrain-steps", type=int, help="before step 0, to take each q(z|k) to p(z|k)")
    flag("--init", type=os.path.expanduser, metavar="RUN", help="start from its networks instead")


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


def imq_kernel(a, b, c):
    """Inverse multiquadratics, Σ cs/(cs + ‖a_i − b_j‖²) over scales s: (n, d), (m, d) → (n, m)."""
    if a.is_cuda:  # cdist would start a block of threads for each pair; on a CPU it is faster
        squared = (a[:, None] - b).square().sum(2)
    else:
        squared = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    return sum(c * s / (c * s + squared) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))


def mmd(z_q, w_q, z_p, w_p):
    """E k(z, z′) + E k(y, y′) − 2 E k(z, y), z ~ q, y ~ p, unbiased; points (n, K, d), weights (n, K)."""
    n, components, d = z_q.shape
    row = torch.arange(n * components, device=z_q.device) // components
    other = row[:, None] != row  # points in one row, of one x, are not independent
    z, y = z_q.flatten(0, 1), z_p.flatten(0, 1)
    w, v = w_q.flatten(), w_p.flatten()
    zz = w @ (imq_kernel(z, z, d / 2) * other) @ w
    yy = v @ (imq_kernel(y, y, d / 2) * other) @ v
    zy = w @ imq_kernel(z, y, d / 2) @ v
    return (zz + yy) / (n * (n - 1)) - 2 * zy / n**2


def wae_loss(x, x_rec, q, z_q, z_p, mmd_weight):
    """E_x Σ_k q(k|x) c(x, G(z_k)) + λ MMD(q(z), p(z)), z_k ~ q(z|k,x).

    x (n, …), x_rec (n, K, …), q (n, K), z_q and z_p (n, K, d), the latter a draw of each p(z|k).
    c is the squared error of (x + 1)/2, summed over pixels and channels: it grows with the image.
    """
    errors = ((x[:, None] - x_rec) / 2).square().flatten(2).sum(2)
    cost = (q * errors).sum(1).mean()
    distance = mmd(z_q, q, z_p, torch.full_like(q, 1 / q.shape[1]))
    return {"loss": cost + mmd_weight * distance, "reconstruction": cost, "mmd": distance}


def elbo_loss(x, logits, log_q, mean, log_var, means, std):
    """−ELBO = E_x Σ_k q(k|x) [−log p(x|z_k) + KL(q(z|k,x)‖p(z|k))] + KL(q(k|x)‖Uniform).

    z_k ~ q(z|k,x); p(x|z) is Bernoulli's, of (x + 1)/2. x (n, …), G's logits (n, K, …), log q(k|x)
    (n, K), mean and log-variance of q(z|k,x) (n, K, d), means (K, d) and std of p(z|k).
    """
    q, target = log_q.exp(), (x[:, None] + 1) / 2
    errors = (nn.functional.softplus(logits) - target * logits).flatten(2).sum(2)
    kl = ((log_var.exp() + (mean - means).square()) / std**2 - 1 - log_var + 2 * math.log(std)).sum(2) / 2
    terms = {"reconstruction": errors, "kl_z": kl, "kl_k": log_q + math.log(q.shape[1])}
    terms = {name: (q * term).sum(1).mean() for name, term in terms.items()}
    return {"loss": sum(terms.values())} | terms


def moment_loss(mean, log_var, means, std):
    """Squared distances of means and variances of each q(z|k) = E_x q(z|k,x) and p(z|k), summed."""
    variance = log_var.exp().mean(0) + mean.var(0, correction=0)
    return (mean.mean(0) - means).square().sum() + (variance - std**2).square().sum()


# Training


def component_means(config, device=None):
    """μ_k, the first K unit vectors: (K, z_dim)."""
    z_dim, components = config.z_dim, config.components or config.z_dim
    if components > z_dim:
        raise ValueError(f"--components {components}: --z-dim {z_dim} takes at most as many")
    return torch.eye(components, z_dim, device=device)


def networks(config):
    """{"generator": z → x, "encoder": x → each q(z|k,x), "classifier": x → q(k|x)}; or ValueError."""
    shape, size, z_dim, width = config.shape, math.prod(config.shape), config.z_dim, config.width
    components, image = len(component_means(config)), len(shape) == 3
    norm, squash = (nn.BatchNorm1d, nn.Tanh()) if image else (nn.Identity, nn.Identity())
    if config.objective == "vae" and not image:
        raise ValueError("--objective vae has a likelihood of pixels, none of points: take wae")
    if config.network == "mlp":
        decoder = mlp(z_dim, size, 8 * width, norm=norm, slope=0)
        generator = nn.Sequential(decoder, nn.Unflatten(1, shape), squash)
        classifier = mlp(size, components, 8 * width, norm=norm, slope=0)
    else:
        generator = Generator(shape, z_dim, width).apply(init_weights)  # else it may lose a component
        classifier = Encoder(shape, components, width, norm=True)
    parts = [mlp(size, 2 * z_dim, width, layers=1, norm=norm, slope=0) for _ in range(components)]
    return {"generator": generator, "encoder": nn.ModuleList(parts), "classifier": classifier}


def draw_z(n, config, device, label=None):
    """n draws from the prior, (n, z_dim): from the mixture, or from its component 0 … K − 1."""
    means = component_means(config, device)
    k = torch.randint(len(means), (n,), device=device) if label is None else label
    return means[k] + config.prior_std * torch.randn(n, config.z_dim, device=device)


def generate(nets, z, logits=False):
    """z (N, z_dim) → x_fake (N, *shape), images in [−1, 1], or the logits of (x_fake + 1)/2."""
    # G ends in tanh(a), and (tanh(a) + 1)/2 = sigmoid(2a)
    return 2 * nn.Sequential(*list(nets["generator"])[:-1])(z) if logits else nets["generator"](z)


def classify(nets, x):
    """x (N, *shape) → q(k|x), (N, K)."""
    return nets["classifier"](x).softmax(1)


def component_codes(nets, x):
    """x (N, *shape) → mean and log-variance of q(z|k,x), each (N, K, z_dim)."""
    return torch.stack([part(x) for part in nets["encoder"]], dim=1).chunk(2, dim=2)


def encode(nets, x):
    """x (N, *shape) → z_hat (N, z_dim), the mean of q(z|k,x) for the most probable k."""
    mean, _ = component_codes(nets, x)
    return mean[torch.arange(len(x), device=x.device), classify(nets, x).argmax(1)]


def features(nets, x):
    """x (N, *shape) → the last hidden layer behind q(k|x), (N, features)."""
    return nn.Sequential(*list(nets["classifier"])[:-1])(x)


def build(config, train_set, test_set):
    """Networks, pre-trained, optimisers, one iteration, pictures; sets (x, y) as load_data's."""
    device, n, (x_train, _) = torch.device(config.device), config.batch_size, train_set
    nets = nn.ModuleDict(networks(config)).to(device, memory_format=torch.channels_last)
    means, std, vae = component_means(config, device), config.prior_std, config.objective == "vae"
    noise = torch.randn(8 if len(config.shape) == 3 else 500, 1, config.z_dim, device=device)
    settings = {"lr": config.lr, "betas": (0.5, 0.999), "fused": True, "capturable": device.type == "cuda"}
    optimizers = {name: torch.optim.Adam(net.parameters(), **settings) for name, net in nets.items()}
    if config.init and not config.resume:
        try:
            saved = torch.load(Path(config.init, "checkpoint.pt"), "cpu", weights_only=True)
            for name, net in nets.items():
                net.load_state_dict(saved["networks"][name])
        except Exception:  # what a damaged or foreign file raises has no common class
            fail(f"--init {config.init}: checkpoint.pt is missing, damaged or of other networks")
    elif not config.resume:  # a phase of its own, before step 0
        optimizer = torch.optim.Adam(nets["encoder"].parameters(), 5e-3)
        for _ in trange(config.pretrain_steps, desc="pre-training", disable=None):
            x = sample_batch(x_train, n, device)
            moment_loss(*component_codes(nets, x), means, std).backward()
            optimizer.step()
            optimizer.zero_grad()

    def iteration():
        x = sample_batch(x_train, n, device)
        log_q = nets["classifier"](x).log_softmax(1)
        mean, log_var = component_codes(nets, x)
        z_q = mean + (log_var / 2).exp() * torch.randn_like(mean)
        x_rec = generate(nets, z_q.flatten(0, 1), logits=vae).unflatten(0, z_q.shape[:2])
        if vae:
            values = elbo_loss(x, x_rec, log_q, mean, log_var, means, std)
        else:
            z_p = means + std * torch.randn_like(z_q)
            values = wae_loss(x, x_rec, log_q.exp(), z_q, z_p, config.mmd_weight)
        values["loss"].backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        usage = log_q.exp().mean(0)
        values |= {"usage_min": usage.min(), "usage_max": usage.max()}
        return {name: value.detach() for name, value in values.items()}

    def pictures(z):
        x = as_float(test_set[0][: len(z) // 2]).to(device)
        pairs = torch.stack([x, generate(nets, encode(nets, x))], dim=1)
        grids = {"samples": (generate(nets, z), 8), "reconstructions": (pairs, 8)}
        for name, scale in {"components": 1, "components-half": 0.5}.items():  # a column for each k
            x_k = generate(nets, (means + scale * std * noise).flatten(0, 1))
            grids[name] = (x_k.unflatten(0, (-1, len(means))), len(means))
        return grids

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
