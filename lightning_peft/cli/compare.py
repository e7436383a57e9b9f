"""The same run over several methods and seeds, one after another, and what came of it."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_peft.cli.children import ChildInterrupted, last_lines, run_child
from lightning_peft.cli.compare_plan import (
    Logging,
    Planned,
    check_folders,
    facts_of,
    labels_of,
    metric_of,
    plan,
    resolve,
)
from lightning_peft.cli.reporting import EXTRAS, Interrupted, console_for_tables
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tracking.comparison import (
    Comparison,
    Run,
    summary_of,
    terminal_table,
    title_of,
    verdict_lines,
    write_results,
)
from lightning_peft.tracking.comparison.report import write_text

HELP = """\
Compare methods: the same data, budget and seeds for each, one run after another.

methods:
  LoRA,IA3,…     by name, with their defaults; the fields of a method in the configuration hold for that method alone
  all            every method that has defaults
  full           full fine-tuning; a task's learning rate is 1e-4 where the configuration names none
  probe          trains modules_to_save alone, or else the output head; learning rate 3e-2 likewise
  variant.yaml   a configuration laid over the other ones, such as a quantization or another rank

Each run is in DIR/runs with its configuration, log, checkpoints and report; results.html, .md, .csv and .json are in
DIR. The same command again goes on where it was stopped, and runs what failed once more; runs of another configuration
that have ended in DIR are refused, not deleted. Exit code 1: some runs failed. Every other option is one of `fit`."""


@dataclass
class Given:
    """What a command line says."""

    methods: list[str]
    seeds: list[int]
    out: Path
    metric: str | None
    mode: str | None
    logging: Logging | None
    words: list[str]
    """For `fit`."""


def run_compare(words: Sequence[str]) -> int:
    """Run what has not run yet, write the results, and print the table.

    Returns:
        0, or 1 where a run has failed.

    Raises:
        PEFTError: with all that is wrong with the options, the configuration or the installation, before any run.
        Interrupted: the user stopped it; the results so far are written.
    """
    given = _given(words)
    sections = resolve(labels_of(given.methods), given.words)
    planned = plan(sections, given.seeds, given.out, given.logging)
    check_folders(planned)
    metric, mode = metric_of(sections, given.metric, given.mode)
    command = f"lightning-peft compare {shlex.join(words)}"
    done: dict[tuple[str, int], Run] = {}

    def comparison() -> Comparison:
        runs = [done.get((run.label, run.seed)) or Run(run.label, run.seed, run.report()) for run in planned]
        return Comparison(runs, metric, mode, command, list(sections), facts_of(sections))

    try:
        _carry_out(planned, done, comparison)
    except ChildInterrupted as error:
        write_results(comparison(), given.out)
        ended = sum(run.report() is not None for run in planned)
        raise Interrupted(f"{error} {ended} of {len(planned)} runs have ended.\nTo go on: {command}") from None
    return _conclude(comparison(), given.out)


def _given(words: Sequence[str]) -> Given:
    parser = argparse.ArgumentParser(
        "lightning-peft compare", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, exit_on_error=False,
    )  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="commas or spaces between them")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the runs and the results are")
    parser.add_argument("--seeds", nargs="+", default=["0"], metavar="N", help="default: 0")
    parser.add_argument(
        "--metric", help="a validation metric; default: the one that ModelCheckpoint monitors, or val_loss"
    )
    parser.add_argument("--mode", choices=("max", "min"), help="which of its values is the better one")
    parser.add_argument("--wandb_project", metavar="NAME", help="log each run to W&B too")
    parser.add_argument("--wandb_group", metavar="NAME", help="default: the name of DIR")
    own, rest = parser.parse_known_args(list(words))
    faults = [f"--{name}: is missing" for name in ("methods", "out") if not getattr(own, name)]
    faults += [] if any(word.partition("=")[0] in ("--config", "-c") for word in rest) else ["--config: is missing"]
    seeds = [part.strip() for word in own.seeds for part in word.split(",") if part.strip()]
    faults += [f"--seeds: {seed!r} is no whole number of at least 0" for seed in seeds if not seed.isdecimal()]
    if not seeds:
        faults.append("--seeds: names none")
    if own.wandb_group and not own.wandb_project:
        faults.append("--wandb_group: is of no use without --wandb_project")
    for package in ("plotly", *(["wandb"] if own.wandb_project else [])):
        if importlib.util.find_spec(package) is None:
            faults.append(f"{package} is not installed; pip install 'lightning-peft[{EXTRAS[package]}]'")
    if own.out is not None and own.out.exists() and not own.out.is_dir():
        faults.append(f"--out: {own.out} is a file; give a folder")
    if faults:
        raise PEFTError(faults)
    logging = Logging(own.wandb_project, own.wandb_group or own.out.resolve().name) if own.wandb_project else None
    numbers = list(dict.fromkeys(map(int, seeds)))
    return Given(own.methods, numbers, own.out, own.metric, own.mode, logging, rest)


def _carry_out(
    planned: Sequence[Planned], done: dict[tuple[str, int], Run], comparison: Callable[[], Comparison]
) -> None:
    """Start the runs that have not ended well yet, one after another, note what came of each in `done`, and say it.

    Raises:
        ChildInterrupted: with where it was.
    """
    console = Console()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console,
        transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task("", total=len(planned))
        for number, run in enumerate(planned, start=1):
            name = f"{title_of(run.label)}, seed {run.seed}"
            progress.update(bar, description=name)
            place = f"[{number}/{len(planned)}] {name}"
            if run.report() is not None:
                _say(console, f"{place}: was there already")
            else:
                _say(console, f"{place}: {run.folder}")
                try:
                    done[run.label, run.seed] = _run(run, progress.refresh)
                except ChildInterrupted:
                    raise ChildInterrupted(f"Interrupted in {name}, which will begin anew.") from None
                _say(console, f"    {_outcome(comparison(), done[run.label, run.seed])}")
            progress.advance(bar)


def _outcome(comparison: Comparison, run: Run) -> str:
    """What came of a run, in a line."""
    if fault := comparison.fault(run):
        return f"failed: {summary_of(fault)}"
    return f"{comparison.metric} {comparison.best(run):.4g}"


def _run(run: Planned, tick: Callable[[], None]) -> Run:
    """One run, in a folder that holds nothing else."""
    if run.file.exists():
        shutil.rmtree(run.folder)
    log = run.folder / "log.txt"
    write_text(run.file, run.text)
    code = run_child(["fit", "--config", str(run.file)], log, tick)
    report = run.report()
    if code == 0 and report is not None:
        return Run(run.label, run.seed, report)
    ended = f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
    return Run(run.label, run.seed, None, f"{last_lines(log)}\n({ended}; {log})".strip())


def _conclude(comparison: Comparison, out: Path) -> int:
    """Write the results, and print them."""
    write_results(comparison, out)
    console = console_for_tables()
    console.print(terminal_table(comparison, console.width))
    lines = verdict_lines(comparison)
    for run in comparison.failed():
        lines.append(f"Failed: {title_of(run.label)}, seed {run.seed}: {summary_of(comparison.fault(run))}")
    lines.append(f"Results  {out / 'results.html'}, and .md, .csv and .json beside it")
    for line in lines:
        _say(console, line)
    return 1 if comparison.failed() else 0


def _say(console: Console, line: str) -> None:
    # not broken, so that a path in it can be copied
    console.print(line, highlight=False, markup=False, soft_wrap=True)
