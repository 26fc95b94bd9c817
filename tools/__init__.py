"""Command-line tools that work on the folder of a run: python -m tools.sample, python -m tools.evaluate, …"""

import sys
from pathlib import Path

# Model files and common.py are always those of this checkout: `python -m` looks into the working directory
# first, which may be the folder of somebody else's run, with a file wgan.py of its own.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
