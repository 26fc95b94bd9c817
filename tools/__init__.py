"""Command-line tools that work on the folder of a run: python -m tools.sample, python -m tools.evaluate."""
