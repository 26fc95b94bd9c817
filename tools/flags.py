"""The command lines of tools and experiments; nothing heavy is imported here, so that --help is quick."""

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from contextlib import contextmanager
from datetime import date
from importlib.util import find_spec

from tqdm import tqdm


class Parser(ArgumentParser):
    """A parser with the flags that the tools share; a mistake is one line on stderr and exit code 2.

    `tool` is the name of the module, as in "tools.sample".
    """

    def __init__(self, tool, description):
        super().__init__(
            prog=f"python -m {tool}",
            description=description,
            formatter_class=ArgumentDefaultsHelpFormatter,
        )
        self.tool = tool
        self.failed = False

    def add_shared(self, batch_size):
        """The flags at the end of every tool's."""
        flag = self.add_argument
        flag("--seed", type=whole(0), default=0, help="fixes everything random")
        flag("--batch-size", type=whole(1), default=batch_size, help="items at a time")
        self.add_places()

    def add_places(self):
        """--data-dir and --device."""
        self.add_data_dir()
        devices = ("auto", "cuda", "mps", "cpu")
        self.add_argument("--device", choices=devices, default="auto", help="auto: a GPU if any")

    def add_data_dir(self):
        """--data-dir, which a checkpoint does not decide, as it may be somebody else's."""
        places = "where data sets are found, downloaded, cached"
        self.add_argument("--data-dir", type=os.path.expanduser, default="data", help=places)

    def parse_args(self, argv=None):
        """The flags, `device` as a torch.device."""
        options = super().parse_args(argv)
        import torch  # takes seconds, which --help and a mistake do without

        gpu = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
        device = gpu if options.device == "auto" else options.device
        if device not in ("cpu", gpu):
            self.error(f"--device {device}: PyTorch finds none on this machine")
        options.device = torch.device(device)
        return options

    def known(self, chosen, names, kind):
        """The chosen of these names, all unless any is chosen."""
        unknown = [name for name in chosen if name not in names]
        if unknown:
            self.error(f"{unknown[0]} is no {kind}; known are {', '.join(names)}")
        return chosen or [*names]

    def needs(self, *packages):
        """Stop now, not after minutes, if one of these is not installed."""
        for package in packages:
            if find_spec(package) is None:
                self.error(f"{package} is missing: pip install -r requirements-dev.txt")

    @contextmanager
    def mistakes(self):
        """Inside, a user's mistake, too little memory and Ctrl-C are one line each."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.error(error)
        except (MemoryError, RuntimeError) as error:
            if not memory_is_full(error):
                raise
            self.error("memory is full: take a smaller --n or --batch-size")
        except KeyboardInterrupt:
            self.complain("stopped")
            sys.exit(130)

    def sign(self, device):
        """The last line of a table: with what, where and when its figures were measured."""
        import torch

        print(f"torch {torch.__version__}; {device}, {torch.get_num_threads()} threads; {date.today()}")

    def complain(self, message):
        """One line on stderr; `failed` is true from now on."""
        self.failed = True
        tqdm.write(f"{self.tool}: error: {' '.join(str(message).split())}", file=sys.stderr)

    def error(self, message):
        """One line on stderr, and out."""
        self.complain(message)
        sys.exit(2)


def memory_is_full(error):
    """Whether this is what an error says; of a CPU's memory PyTorch only tells in words."""
    words = ("out of memory", "can't allocate memory", "calculation overflowed")
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


def whole(least):
    """A type of argparse: a whole number from `least` on."""

    def number(text):
        if not least <= int(text) < 2**63:
            raise ValueError
        return int(text)

    number.__name__ = f"whole number from {least}"
    return number
