"""The evidence: python -m experiments.claims, .study, .along; experiments/reproduce.sh."""

import tools  # noqa: F401  it sees to it that model files are those of this checkout
