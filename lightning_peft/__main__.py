"""`python -m lightning_peft`, the same as the command `lightning-peft`."""

import sys

from lightning_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
