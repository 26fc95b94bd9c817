"""The classifier whose features and labels the measures rest on: trained once for a data set, then cached."""

import hashlib
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import as_float, load_data
from tools.runs import in_batches, load_tensors, seeded

VERSION = 2  # of network and training: another one, and what is cached no longer counts
EPOCHS, BATCH, LR = 3, 128, 3e-3


class Classifier(nn.Module):
    """x (N, C, S, S) in [−1, 1] → logits (N, classes), from `features` (N, 64), the last hidden layer."""

    def __init__(self, shape, classes):
        super().__init__()
        channels, size, widths = shape[0], shape[-1], [16]
        while size > 4 and len(widths) < 6:
            size, widths = (size + 1) // 2, [*widths, 2 * widths[-1]]
        layers = []
        for n_in, n_out in pairwise([channels, *widths[:-1]]):
            layers += [nn.Conv2d(n_in, n_out, 5, stride=2, padding=2), nn.BatchNorm2d(n_out), nn.ReLU()]
        inputs = (widths[-2] if layers else channels) * size**2
        self.hidden = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.ReLU()
        )
        self.out = nn.Linear(64, classes)

    def features(self, x):
        return self.hidden(x)

    def logits(self, features):
        return self.out(features)

    def forward(self, x):
        return self.logits(self.features(x))


class PerChannel(nn.Module):
    """One classifier on each of three channels: features (N, 3·64), logits (N, classes³), the first slowest.

    The channels' classes are taken as independent: log p(a, b, c | x) = log p(a) + log p(b) + log p(c).
    """

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def features(self, x):
        return torch.cat([self.classifier.features(channel) for channel in x.split(1, dim=1)], dim=1)

    def logits(self, features):
        a, b, c = (self.classifier.logits(part).log_softmax(1) for part in features.chunk(3, dim=1))
        return (a[:, :, None, None] + b[:, None, :, None] + c[:, None, None, :]).flatten(1)

    def forward(self, x):
        return self.logits(self.features(x))


def classifier_for(dataset, data_dir, image_size, device):
    """(classifier in eval mode, its accuracy on the test split); ValueError if the data set has no labels.

    It learns from the labels of the train split, always in the same way, and is kept in `data_dir`/cache.
    That of stacked_mnist is the one of mnist on each channel.
    """
    if dataset == "stacked_mnist":
        classifier, _ = classifier_for("mnist", data_dir, image_size, device)
        classifier = PerChannel(classifier)
        x, y = load_data(dataset, data_dir, "test", image_size, "cpu")
        return classifier, accuracy(classifier, x, y, device)

    x, y = load_data(dataset, data_dir, "train", image_size, "cpu")
    if y is None:
        raise ValueError(f"{dataset} has no labels to train a classifier on")
    digest = hashlib.sha256(x.numpy())
    digest.update(y.numpy())
    digest.update(repr((EPOCHS, BATCH, LR)).encode())  # one trained in another way is another one
    name = f"classifier-{Path(dataset).name}-{image_size}-{VERSION}-{digest.hexdigest()[:16]}.pt"
    file, classifier = Path(data_dir).expanduser() / "cache" / name, Classifier(x.shape[1:], int(y.max()) + 1)
    if file.exists():
        saved = load_tensors(file)
        classifier.load_state_dict(saved["network"])
        return classifier.to(device).eval(), saved["accuracy"]
    classifier = trained(classifier.to(device), x, y, device)
    x, y = load_data(dataset, data_dir, "test", image_size, "cpu")
    found = accuracy(classifier, x, y, device)
    keep({"network": classifier.state_dict(), "accuracy": found}, file)
    return classifier, found


def trained(classifier, x, y, device):
    """The classifier after EPOCHS times all items, with the same random numbers every time."""
    with seeded(0):
        for layer in classifier.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        batch = min(BATCH, len(x))
        steps = max(EPOCHS * len(x) // batch, 200)  # a small folder is seen more often
        optimizer = torch.optim.Adam(classifier.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps)
        classifier.train()
        order = torch.cat([torch.randperm(len(x)) for _ in range(-(-steps * batch // len(x)))])
        for rows in tqdm(order[: steps * batch].split(batch), "classifier", disable=None, leave=False):
            logits = classifier(as_float(x[rows]).to(device))
            F.cross_entropy(logits, y[rows].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return classifier.eval()


def accuracy(classifier, x, y, device):
    """The share of x, as load_data gives it, whose label the classifier finds."""
    return (in_batches(lambda x: classifier(x).argmax(1), x, 500, device) == y).float().mean().item()


def keep(saved, file):
    """Write the file in one move; where that is not allowed, say so and go on without."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as opened:
                torch.save(saved, opened)
            os.replace(scratch, file)
        except BaseException:
            os.unlink(scratch)
            raise
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        print(f"the classifier is not cached, the next call trains it again ({error})", file=sys.stderr)
