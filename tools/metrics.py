"""The measures, as functions of tensors. docs/evaluation.md says what each means, and whether more is better.

They draw from torch's default generator alone, where they draw at all. Images are float (N, C, S, S) in
[−1, 1], labels int64 (N,), codes and features float (N, d); results are Python numbers.
"""

import math
import warnings

import torch
from torch import nn

from common import as_float, sample_batch

MS_SSIM_SIGMA, MS_SSIM_WINDOW = 0.8, 7  # standard deviation and width of the window, in pixels
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, from the finest scale on
CRITIC = {"width": 16, "steps": 300, "batch": 64, "lr": 1e-3, "gp_weight": (0.1, 100)}
CRITIC_OF_POINTS = CRITIC | {"steps": 1000, "batch": 128}
PROBE = {"C": 0.01, "tol": 1e-3, "max_iter": 500}  # of the linear probe, not always converged

# Samples


def frechet_distance(a, b):
    """Of two Gaussians with the moments of features (N, d) and (M, d): FID, if they are Inception's."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = nn.Identity()
    identity.num_features = a.shape[1]
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    return max(metric.compute().item(), 0.0)  # rounding takes equal moments below 0


def inception_score(logits):
    """exp E KL(p(y|x) ‖ E p(y|x)) of logits (N, classes), all in one split: 1 … classes."""
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings():  # it keeps all features, and warns of that
        warnings.filterwarnings("ignore", "Metric `InceptionScore` will save", UserWarning)
        metric = InceptionScore(feature=nn.Identity(), splits=1)
    # In float64, and no class with probability 0, whose logarithm would make a confident score nan.
    metric.update(logits.double().log_softmax(1).clamp(min=-500))
    with warnings.catch_warnings():  # of the deviation over splits, which is not asked for
        warnings.filterwarnings("ignore", "std\\(\\): degrees of freedom is <= 0", UserWarning)
        return metric.compute()[0].item()


def class_shares(labels, classes):
    """The share of each class: a list of `classes` numbers."""
    return (torch.bincount(labels, minlength=classes) / len(labels)).tolist()


def entropy(shares):
    """−Σ p log p in nats: at most the logarithm of their number."""
    from scipy.stats import entropy

    return float(entropy(shares))


def ms_ssim_scales(size):
    """How many halvings of a picture leave 8 pixels for the window, itself counted: 3 for 32, at most 5."""
    return min(len(MS_SSIM_WEIGHTS), 1 + int(math.log2(size / 8))) if size >= 8 else 0


def ms_ssim_diversity(x):
    """1 − mean MS-SSIM over the pairs (x_0, x_1), (x_2, x_3), … of pictures, bytes or floats in [−1, 1]."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    weights = MS_SSIM_WEIGHTS[: ms_ssim_scales(x.shape[-1])]
    options = {"sigma": MS_SSIM_SIGMA, "kernel_size": MS_SSIM_WINDOW, "data_range": 1.0, "reduction": "none"}
    options["betas"] = tuple(weight / sum(weights) for weight in weights)
    pairs = x[: len(x) // 2 * 2].unflatten(0, (-1, 2)).split(250)
    halves = ((as_float(pair).add(1).div(2)).unbind(1) for pair in pairs)
    return 1 - torch.cat([ms_ssim(a, b, **options) for a, b in halves]).mean().item()


def independent_critic(x_train, fake_train, x_value, fake_value, budget, device="cpu"):
    """E F(x) − E F(fake) on *_value of a WGAN-GP critic F that has learnt on *_train.

    All as load_data has it; the budget is CRITIC or CRITIC_OF_POINTS. λ grows geometrically: at the end the
    slope of F, some 1 + W/(2λ) at its optimum, has to be near 1; but a large λ at the beginning would hold F
    to the slope it starts with, be it downhill, as the way to the other leads through 0.
    """
    from wgan_gp import Critic, critic_loss, gradient_penalty, mlp

    shape = list(x_train.shape[1:])
    try:
        critic = Critic(shape, budget["width"], norm=False)
    except ValueError:  # points, or a size that only an mlp takes
        critic = nn.Sequential(mlp(math.prod(shape), 1, 8 * budget["width"]), nn.Flatten(0))
    critic.to(device)
    optimizer = torch.optim.Adam(critic.parameters(), budget["lr"], betas=(0.5, 0.9))
    first, last = budget["gp_weight"]
    for step in range(budget["steps"]):
        gp_weight = first * (last / first) ** (step / budget["steps"])
        x = sample_batch(x_train, budget["batch"]).to(device)
        fake = sample_batch(fake_train, budget["batch"]).to(device)
        penalty = gradient_penalty(critic, x, fake)
        loss = critic_loss(critic(x), critic(fake)) + gp_weight * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def mean_score(x):
        scores = [critic(as_float(part).to(device)).cpu() for part in x.split(500)]
        return torch.cat(scores).double().mean().item()

    return mean_score(x_value) - mean_score(fake_value)


def mixture_modes(dataset):
    """(centres (K, 2), standard deviation) of the data set `ring` or `grid`, in its scaling; else None."""
    if dataset == "ring":
        angles = 2 * math.pi * torch.arange(8) / 8
        return 2 / 1.414 * torch.stack([angles.cos(), angles.sin()], dim=1), 0.02 / 1.414
    if dataset == "grid":
        line = torch.arange(-4.0, 5, 2) / 2.828
        return torch.cartesian_prod(line, line), 0.05 / 2.828
    return None


def nearest_mode(points, centres):
    """(index of the nearest centre, distance to it), each (N,)."""
    distance, index = torch.cdist(points, centres).min(dim=1)
    return index, distance


def covered_modes(points, centres, std):
    """(modes with a high-quality sample, share of those samples, KL of their modes to uniform in nats).

    A sample is of high quality within 3 std of the nearest mode; without any, the KL is nan.
    """
    index, distance = nearest_mode(points, centres)
    good = distance <= 3 * std
    modes, divergence = covered_classes(index[good], len(centres)) if good.any() else (0, math.nan)
    return modes, good.double().mean().item(), divergence


def covered_classes(labels, classes):
    """(classes that occur, KL of their shares to the uniform distribution in nats)."""
    shares = class_shares(labels, classes)
    return sum(p > 0 for p in shares), math.log(classes) - entropy(shares)


# Encoders


def mean_absolute_error(x, y):
    """Per value: of pictures in units of their range [−1, 1], of points in their own."""
    return (as_float(x) - as_float(y)).abs().mean(dtype=torch.float64).item()


def nearest_neighbour_accuracy(train, y_train, test, y_test, device="cpu"):
    """The share of test items whose nearest train item, in Euclidean distance, has their label.

    In torch, as a GPU takes it, and two cores half the time that scikit-learn's does.
    """
    centre = train.mean(0)  # small numbers lose less to rounding in the difference of squares below
    train, test = (train - centre).to(device), test - centre
    squares, hits = train.square().sum(1), 0
    for part, y in zip(test.split(500), y_test.split(500), strict=True):
        nearest = torch.addmm(squares, part.to(device), train.T, alpha=-2).argmin(1)
        hits += (y_train[nearest.cpu()] == y).sum().item()
    return hits / len(test)


def linear_probe_accuracy(train, y_train, test, y_test):
    """Test accuracy of a multinomial logistic regression on the train items, standardised."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(y_train.unique()) == 1:
        return (y_test == y_train[0]).double().mean().item()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")  # that it has not converged
        probe = make_pipeline(StandardScaler(), LogisticRegression(**PROBE))
        probe.fit(train.numpy(), y_train.numpy())
    return float(probe.score(test.numpy(), y_test.numpy()))


# Clusters


def matching_accuracy(clusters, labels):
    """The share of items that a one-to-one assignment of clusters to labels gets right, at best."""
    from scipy.optimize import linear_sum_assignment

    counts = torch.zeros(int(clusters.max()) + 1, int(labels.max()) + 1, dtype=torch.int64)
    counts.index_put_((clusters, labels), torch.ones_like(labels), accumulate=True)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    return counts[rows, columns].sum().item() / len(labels)


def normalized_mutual_information(clusters, labels):
    """I(cluster; label) over the mean of their entropies: 0 if independent, 1 if each gives the other."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(labels.numpy(), clusters.numpy()))
