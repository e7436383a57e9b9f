"""What a run that could not go on says, and its exit code."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Callable

from rich.console import Console

from lightning_peft.cli import FAILED, INTERRUPTED
from lightning_peft.methods.errors import PEFTError

EXTRAS = {
    "bitsandbytes": "quantization",
    "datasets": "data",
    "faster_coco_eval": "vision",
    "plotly": "compare",
    "pyarrow": "data",
    "wandb": "wandb",
}
"""The extra of this package that installs a module."""


def console_for_tables() -> Console:
    """Standard output; in a file or a pipe, where 80 columns would break names, at least 160 wide."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 160))


class Interrupted(KeyboardInterrupt):
    """A run that the user stopped, with what to tell of it."""


def reported(call: Callable[[], int]) -> int:
    """What `call` returns, or the exit code for the user's mistake or interruption, told on standard error.

    Any other exception is a fault of a program, the user's or this one, and goes on with its traceback.
    """
    try:
        return call()
    except PEFTError as error:
        return _tell(error.faults)
    except ArgumentError as error:
        return _tell([error.message])
    except KeyboardInterrupt as error:
        print(f"\n{error}" if str(error) else "\nInterrupted.", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in EXTRAS:
            return _tell([f"{module} is not installed; pip install 'lightning-peft[{EXTRAS[module]}]'"])
        if error.name is None:  # Lightning's own word on a package that it does without until it is asked for
            return _tell([str(error)])
        raise
    except Exception as error:
        # imported here, as listing the methods needs no Lightning
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        if isinstance(error, MisconfigurationException):
            return _tell([str(error)])
        raise


def _tell(faults: tuple[str, ...] | list[str]) -> int:
    if len(faults) == 1:
        print(f"lightning-peft: {faults[0]}", file=sys.stderr)
    else:
        lines = "\n".join(f"  {fault}" for fault in faults)
        print(f"lightning-peft: {len(faults)} faults\n{lines}", file=sys.stderr)
    return FAILED
