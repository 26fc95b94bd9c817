"""What tools.evaluate measures of runs, and of what: samples, codes, labels."""

import json
import sys
import time
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from tqdm import tqdm

from tools import metrics
from tools.classifier import classifier_for
from tools.flags import memory_is_full
from tools.runs import (
    Run,
    draw_z,
    fresh_networks,
    in_batches,
    load_split,
    open_run,
    probabilities,
    reconstructions,
    samples,
    seeded,
)
from tools.tables import DIGITS

LARGE = 60_000  # train items that are used of a larger set
MANY = 100  # classes that are too many for a linear probe


class NotMeasured(Exception):
    """Why a measure says nothing here, in one sentence."""


# Data


class Data:
    """The data of runs that can be compared, with their classifier and what is measured of the data alone."""

    def __init__(self, run, options):
        self.name, self.options = run.config.dataset, options
        self.x_train, self.y_train = load_split(run, "train", options.data_dir)
        self.x_test, self.y_test = load_split(run, options.split, options.data_dir)
        with seeded(0):  # in no order: the two halves of MNIST's test split are of different writers
            self.x_train, self.y_train = shuffled(self.x_train, self.y_train, LARGE)
            self.x_test, self.y_test = shuffled(self.x_test, self.y_test)
        self.images, self.modes = run.images, metrics.mixture_modes(self.name)
        self.labelled, self.classifier, self.accuracy = self.y_train is not None, None, None
        if self.labelled:
            self.classes = 1000 if self.name == "stacked_mnist" else int(self.y_train.max()) + 1
        if self.images and self.labelled:
            where = self.name, options.data_dir, run.config.image_size
            self.classifier, self.accuracy = classifier_for(*where, options.device)
            self.train_features = self.features(self.x_train)

    def features(self, x):
        """The classifier's features of pictures."""
        return in_batches(self.classifier.features, x, 500, self.options.device)

    def logits(self, features):
        """The classifier's logits of its features."""
        return in_batches(self.classifier.logits, features, 500, self.options.device)

    def labels_of(self, x):
        """What x shows: the class that the classifier sees, of points the nearest mode; else NotMeasured."""
        if self.classifier:
            return self.logits(self.features(x)).argmax(1)
        if self.modes and self.labelled:
            return metrics.nearest_mode(x, self.modes[0])[0]
        raise NotMeasured(f"{self.name} has no labels")

    @cached_property
    def real(self):
        """The measures of samples and labels, of real data in their place; for the critic train items."""
        test, train = (Subject(None, x[: self.options.n]) for x in (self.x_test, self.x_train))
        subjects = {"independent critic": train} | dict.fromkeys(OF_SAMPLES, test)
        stages = {name: (STAGES[name], subjects[name]) for name in self.options.stages if name in subjects}
        found = carried_out(stages, self, "real data")[0]
        if self.labelled and (self.classifier or self.modes):
            found |= agreement(self.labels_of(self.x_test), self.y_test)
        return found

    @cached_property
    def noise(self):
        """The measures of samples, of uniform noise: random bytes, or points on the square of the data."""
        with seeded(self.options.seed):
            if self.images:
                x = torch.randint(256, (self.options.n, *self.x_test.shape[1:]), dtype=torch.uint8)
            else:
                low, high = self.x_train.min(), self.x_train.max()
                x = low + (high - low) * torch.rand(self.options.n, 2)
        names = [name for name in self.options.stages if name in OF_SAMPLES]
        return carried_out({name: (STAGES[name], Subject(None, x)) for name in names}, self, "noise")[0]

    @cached_property
    def chance(self):
        """The measures of labels where each item has the label of another."""
        if not self.labelled:
            return {}
        with seeded(self.options.seed):
            other = self.y_test[torch.randperm(len(self.y_test))]
        return agreement(other, self.y_test) | grouping(other, self.y_test)

    @cached_property
    def pixels(self):
        """The measures of codes, of the pixels in their place; {} where codes are not measured."""
        stages = {"codes": (raw_pixels, None)} if "representation" in self.options.stages else {}
        return carried_out(stages, self, "raw pixels")[0]

    def references(self, run):
        """What to compare the run's measures with: {"real data": {measure: number}, …}."""
        found = {"chance": self.chance, "uniform noise": self.noise, "real data": self.real}
        return found | ({"raw pixels": self.pixels} if run.has("encode") else {})


def shuffled(x, y, most=None):
    """The items in random order, at most so many of them."""
    order = torch.randperm(len(x))[:most]
    return x[order], None if y is None else y[order]


# Measures: (subject, data) → {name in tables.METRICS: number}, or NotMeasured


@dataclass
class Subject:
    """What is measured: samples x, as a data set has them, of a run, or of the data themselves."""

    run: Run | None
    x: torch.Tensor


def classifier_scores(subject, data):
    """Digit-classifier FID, Inception score, class balance; of stacked_mnist the modes."""
    if not data.images:
        return {}
    if data.classifier is None:
        raise NotMeasured(f"{data.name} has no labels, so there is no classifier for FID, IS, classes")
    features = data.features(subject.x)
    logits = data.logits(features)
    labels, found = logits.argmax(1), {}
    shares = metrics.class_shares(labels, data.classes)
    if data.name == "stacked_mnist":
        found["modes"], found["kl_uniform"] = metrics.covered_classes(labels, data.classes)
    else:
        found |= {"rarest_class": min(shares), "entropy": metrics.entropy(shares)}
    found["inception_score"] = metrics.inception_score(logits)
    n, of_features = min(len(features), len(data.train_features)), features.shape[1]
    if n <= of_features:  # their covariance is singular
        items = f"{of_features} samples and train items, not {n}"
        found["not_measured"] = f"classifier FID needs more than {items}"
    else:
        found["fid"] = metrics.frechet_distance(data.train_features, features)
    return found


def diversity(subject, data):
    """1 − MS-SSIM over random pairs."""
    if not data.images:
        return {}
    if len(subject.x) < 2 or not metrics.ms_ssim_scales(subject.x.shape[-1]):
        raise NotMeasured("MS-SSIM needs two samples of 8 pixels or more")
    return {"diversity": metrics.ms_ssim_diversity(subject.x)}


def modes(subject, data):
    """Modes and high-quality samples of ring and grid."""
    if not data.modes:
        return {}
    found, quality, divergence = metrics.covered_modes(subject.x, *data.modes)
    # Where no sample is of high quality there is no divergence.
    return {"modes": found, "high_quality": quality} | ({"kl_modes": divergence} if found else {})


def critic(subject, data):
    """The value of an independent Wasserstein critic."""
    budget = metrics.CRITIC if data.images else metrics.CRITIC_OF_POINTS
    least = 2 * budget["batch"]
    if min(len(subject.x), len(data.x_test)) < least:
        raise NotMeasured(f"the independent critic needs {least} samples and as many test items")
    x, fake = data.x_test.chunk(2), subject.x.chunk(2)
    halves = x[0], fake[0], x[1], fake[1]
    return {"critic": metrics.independent_critic(*halves, budget, data.options.device)}


def reconstruction(subject, data):
    """Errors of G(E(x)), and whether it keeps the label."""
    if not subject.run.has("encode"):
        return {}
    x, y = data.x_test[: data.options.n], data.y_test
    x_rec = reconstructions(subject.run, x, data.options.batch_size)
    found = {"reconstruction": metrics.mean_absolute_error(x, x_rec)}
    if len(x) > 1:
        found["reconstruction_random"] = metrics.mean_absolute_error(x.roll(1, 0), x_rec)
    if y is None:
        return found | {"not_measured": f"{data.name} has no labels that reconstructions could keep"}
    kept = agreement(data.labels_of(x_rec), y[: len(x)])["label_kept"]
    return found | {"label_kept": kept}


def accuracies(name, train, test, data):
    """1-NN and linear probe of codes of the train and the test items."""
    device = data.options.device
    arguments = (train.float().flatten(1), data.y_train, test.float().flatten(1), data.y_test)
    found = {f"nn_{name}": metrics.nearest_neighbour_accuracy(*arguments, device)}
    if data.classes <= MANY:
        found[f"probe_{name}"] = metrics.linear_probe_accuracy(*arguments)
    return found


def representation(subject, data):
    """1-NN and linear probe in z, in features and in those of an untrained encoder."""
    run = subject.run
    if not run.has("encode") or not data.images:
        return {}
    if not data.labelled:
        raise NotMeasured(f"{data.name} has no labels to find from codes")
    untrained = fresh_networks(run.model, run.config, run.device)
    found = {}
    for name, function, nets in (
        ("z", run.model.encode, run.nets),
        ("features", run.model.features, run.nets),
        ("untrained", run.model.features, untrained),
    ):
        coded = partial(in_batches, partial(function, nets), batch_size=500, device=run.device)
        found |= accuracies(name, coded(x=data.x_train), coded(x=data.x_test), data)
    return found


def raw_pixels(subject, data):
    """What representation() gives for the pixels themselves."""
    if not (data.images and data.labelled):
        return {}
    return accuracies("features", data.x_train, data.x_test, data)


def agreement(found, y):
    """The shares of items whose label was found, by the names of all measures that are such a share."""
    right = found == y
    shares = torch.stack([right[y == label].double().mean() for label in y.unique()])
    share = right.double().mean().item()
    asked = {"asked": shares.mean().item(), "asked_worst": shares.min().item()}
    return asked | {"label_kept": share, "accuracy": share}


def grouping(k, y):
    """How well groups k match the labels y, whatever the groups are called."""
    nmi = metrics.normalized_mutual_information(k, y)
    return {"matching": metrics.matching_accuracy(k, y), "nmi": nmi}


def asked(subject, data):
    """Whether samples show the class that they were asked to show; each class is asked equally often."""
    run = subject.run
    if not run.conditional:
        return {}
    each = -(-data.options.n // run.labels)
    y = torch.arange(run.labels).repeat_interleave(each)
    seed = data.options.seed
    z = torch.cat([draw_z(run, each, seed + label, label) for label in range(run.labels)])
    found = agreement(data.labels_of(samples(run, z, data.options.batch_size)), y)
    return {name: found[name] for name in ("asked", "asked_worst")}


def classification(subject, data):
    """What classify() finds: the data's classes, or groups of the model's own, codes or components."""
    run = subject.run
    if not run.has("classify"):
        return {}
    q = probabilities(run, data.x_test)
    usage = {"usage": q.mean(0).tolist(), "least_used": q.mean(0).min().item()} if run.labels else {}
    if not data.labelled:
        return usage | {"not_measured": f"{data.name} has no labels to compare classify() with"}
    if run.labels:  # which it draws samples by, and knows no labels
        return usage | grouping(q.argmax(1), data.y_test)
    return {"accuracy": agreement(q.argmax(1), data.y_test)["accuracy"]}


STAGES = {
    "classifier scores": classifier_scores,
    "diversity": diversity,
    "modes": modes,
    "independent critic": critic,
    "reconstruction": reconstruction,
    "representation": representation,
    "asked": asked,
    "classification": classification,
}
OF_SAMPLES = ("classifier scores", "diversity", "modes")  # those that test items can stand in for


# Runs


def carried_out(stages, data, title):
    """({measure: number}, the usage of each group or None, [what could not be measured]).

    stages: {name: (function, subject)}. Each starts from the seed, so that its result does not depend on
    the others.
    """
    found, not_measured = {}, []
    bar = tqdm(stages.items(), disable=None, leave=False)
    for name, (function, subject) in bar:
        bar.set_description(f"{title}: {name}")
        try:
            with seeded(data.options.seed):
                found |= function(subject, data)
        except NotMeasured as problem:
            not_measured.append(str(problem))
        if "not_measured" in found:
            not_measured.append(found.pop("not_measured"))
    return found, found.pop("usage", None), not_measured


def evaluate(run, data):
    """The content of evaluation.json: what was measured, of what, and how."""
    options = data.options
    x = samples(run, draw_z(run, options.n, options.seed), options.batch_size)
    stages = {name: (STAGES[name], Subject(run, x)) for name in options.stages}
    found, usage, not_measured = carried_out(stages, data, str(run.path))
    settings = {}
    if "independent critic" in options.stages:
        settings["critic"] = metrics.CRITIC if run.images else metrics.CRITIC_OF_POINTS
    if run.images and "representation" in options.stages:
        settings["probe"] = metrics.PROBE
    if run.images and "diversity" in options.stages:
        scales = metrics.ms_ssim_scales(run.config.image_size)
        settings["ms_ssim"] = {"window": metrics.MS_SSIM_WINDOW, "sigma": metrics.MS_SSIM_SIGMA}
        settings["ms_ssim"] |= {"scales": scales}
    if data.classifier:
        settings["classifier"] = {"of": "digits" if data.name in DIGITS else "classes"}
        settings["classifier"] |= {"test_accuracy": data.accuracy}
    return {
        "model": run.name,
        "dataset": data.name,
        "step": run.step,
        "split": options.split,
        "n": options.n,
        "n_real": min(options.n, len(data.x_test)),
        "seed": options.seed,
        "settings": settings,
        "metrics": found,
        **({"usage": usage} if usage else {}),
        "references": data.references(run),
        "not_measured": not_measured,
    }


def opened(options, complain):
    """{data set and shape: [runs]}, in the order given; complain(message) of what is no run."""
    groups = defaultdict(list)
    for path in dict.fromkeys(options.runs):
        try:
            run = open_run(path, options.device)
            groups[run.config.dataset, tuple(run.config.shape)].append(run)
        except (OSError, ValueError) as error:
            complain(error)
    return groups


def evaluate_group(runs, options, complain):
    """(data, [(run, its evaluation)]) of runs on the same data; complain(message) of what fails."""
    options = Namespace(**vars(options))
    options.n = options.n or (10_000 if runs[0].images else 2500)
    options.stages = getattr(options, "stages", [*STAGES])
    file = "evaluation.json" if options.split == "test" else f"evaluation-{options.split}.json"
    try:
        data = Data(runs[0], options)
    except (OSError, ValueError) as error:
        for run in runs:
            complain(f"{run.path}: {error}")
        return None, []
    done = []
    for run in runs:
        start = time.monotonic()
        try:
            result = evaluate(run, data)
            (run.path / file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except (OSError, ValueError, MemoryError, RuntimeError) as error:
            full = memory_is_full(error)
            if isinstance(error, RuntimeError) and not full:  # a bug
                raise
            if full:
                error = "memory is full: take a smaller --n or --batch-size"
            complain(f"{run.path}: {error}")
            continue
        for problem in result["not_measured"]:
            tqdm.write(f"{run.path}: not measured: {problem}", file=sys.stderr)
        tqdm.write(f"{run.path}: evaluated in {time.monotonic() - start:.0f} s", file=sys.stderr)
        done.append((run, result))
    return data, done
