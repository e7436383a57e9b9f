"""The command `lightning-peft`: parses, calls, prints. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

RUNS = {
    "fit": "train, and write checkpoints that hold the adapters alone",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "compute predictions",
    "inspect": "show what would be trained, module by module, without training",
}
"""The verbs that take a configuration, with a line each."""
INTERCHANGE = {
    "export": "write a checkpoint's adapter as a directory that HF peft loads",
    "import": "make a checkpoint of an adapter in HF peft's format, or fetch one from W&B: wandb://…",
    "merge": "write a model of its own, the adapter folded into its weights",
    "push": "upload an exported adapter or a merged model to the hub",
}
"""The verbs between checkpoints and the formats of others."""
PLAN = {"plan": "say what memory a run takes, per method and quantization, and what fits a GPU; trains nothing"}
COMPARE = {"compare": "run several methods on the same data and budget: a table, and a page with plots"}
LISTS = {
    "methods": "list the methods with their fields and defaults; 'methods LoRA' says all about one",
    "env": "show versions, devices, cores and memory",
}
VERBS = {**RUNS, **PLAN, **COMPARE, **LISTS, **INTERCHANGE}
FAILED, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the words after the command's name; by default those of the process.

    Returns:
        0; 2 for a mistake of the user's, told on standard error without a traceback; 130 for an interrupted run.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"lightning-peft {version('lightning-peft')}")
        return 0
    if os.getcwd() not in sys.path:
        # as `python -m` does it, so that a class in a file of the current folder can be named
        sys.path.insert(0, os.getcwd())

    from lightning_peft.cli.reporting import reported

    return reported(lambda: _run(words))


def _run(words: list[str]) -> int:
    verb, rest = words[0], words[1:]
    if verb in LISTS and {"-h", "--help"} & set(rest):
        print(f"usage: lightning-peft {verb}\n\n{LISTS[verb]}")
        return 0
    if verb == "methods":
        from lightning_peft.cli.methods import show_methods

        return show_methods(rest)
    if verb == "env":
        from lightning_peft.cli.env import show_environment

        return show_environment(rest)
    if verb in PLAN:
        from lightning_peft.cli.plan import run_plan

        return run_plan(rest)
    if verb in COMPARE:
        from lightning_peft.cli.compare import run_compare

        return run_compare(rest)
    if verb in INTERCHANGE:
        from lightning_peft.cli.interchange import run_interchange

        return run_interchange(verb, rest)
    if verb not in RUNS and not (verb.startswith("-") and set(rest) & set(RUNS)):
        from lightning_peft.methods.errors import PEFTError, suggestion

        raise PEFTError(f"there is no verb {verb!r}{suggestion(verb, VERBS)} The verbs: {', '.join(VERBS)}")
    from lightning_peft.cli.app import run

    return run(words)


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10}{line}" for verb, line in VERBS.items())
    return f"""\
Parameter-efficient fine-tuning of any LightningModule.

usage: lightning-peft VERB [--config FILE ...] [--SECTION.NAME VALUE ...]

verbs:
{verbs}

  lightning-peft fit --config configs/quickstart.yaml
  lightning-peft fit --config base.yaml --config mine.yaml --peft.method DoRA --peft.method.r 16
  lightning-peft fit --config base.yaml --print_config > whole.yaml
  lightning-peft fit --help            every option; --model.help CLASS for those of one class
  lightning-peft export best.ckpt adapter
  lightning-peft --version

A configuration has the sections model, data, trainer and peft; without peft it is full fine-tuning."""
