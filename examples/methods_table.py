"""How well each method learns the quickstart, with its own defaults, beside a linear probe on the frozen encoder.

    python examples/methods_table.py                             # every method over three seeds; hours on a laptop
    python examples/methods_table.py --methods LoRA IA3 --seeds 0 --short
    python examples/methods_table.py --methods "LoRA over bf16" "LoRA over nf4-dq"

A row is written to runs/methods_table/results.csv as soon as a run has ended, and a run that is there is not run again.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_peft.methods import METHODS
from lightning_peft.tasks import SequenceClassification

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
PROBE = "linear probe"
WITHOUT_DEFAULTS = ("HFPeft", "Hybrid")
BASES = {
    "LoRA over bf16": ["--peft.method=LoRA", "--peft.base_dtype=bfloat16"],
    "LoRA over nf4-dq": ["--peft.method=LoRA", "--peft.base_dtype=bfloat16", "--peft.quantization=nf4-dq"],
}
"""Rows that are asked for by name, to see what 4 bits cost."""
SHORT = ["--data.rows_per_library=120", "--data.max_length=32", "--trainer.max_epochs=2"]
FIELDS = ("method", "seed", "accuracy", "trainable", "seconds")


class LinearProbe(SequenceClassification):
    """The same task with nothing trained but the head."""

    def configure_model(self) -> None:
        """Freezes all that is not the head."""
        super().configure_model()
        self.model.requires_grad_(False)
        self.model.classifier.requires_grad_(True)


def command(method: str, seed: int, folder: Path, short: bool) -> list[str]:
    """The words of one run."""
    words = [sys.executable, "-m", "lightning_peft", "fit", "--config", str(CONFIG), f"--seed_everything={seed}"]
    if method == PROBE:
        words += ["--model=examples.methods_table.LinearProbe", "--model.learning_rate=3e-2", "--peft.method=null"]
    else:
        words += BASES.get(method, [f"--peft.method={method}"])
    words += [f"--trainer.default_root_dir={folder}", f"--trainer.logger.init_args.save_dir={folder}"]
    return [*words, "--trainer.enable_progress_bar=false", *(SHORT if short else [])]


def run(method: str, seed: int, out: Path, short: bool, threads: int) -> dict[str, Any]:
    """One run in a process of its own: its best validation accuracy, what it trained, and how long it took.

    Raises:
        RuntimeError: it failed, with what it said last.
    """
    folder = out / f"{method.replace(' ', '_')}-{seed}{'-short' if short else ''}"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.monotonic()
    done = subprocess.run(
        command(method, seed, folder, short), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{method}, seed {seed}: {done.stderr[-1000:]}")
    newest = max(folder.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime)
    with newest.open(newline="") as file:
        accuracies = [float(row["val_accuracy"]) for row in csv.DictReader(file) if row.get("val_accuracy")]
    trained = next((line for line in done.stdout.splitlines() if line.startswith("trainable params: ")), "")
    # what has no adapters prints no such line
    trainable = int(trained.split()[2].replace(",", "")) if trained else 384 * 8 + 8
    seconds = round(time.monotonic() - start)
    return dict(zip(FIELDS, (method, seed, max(accuracies), trainable, seconds), strict=True))


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [name for name in METHODS if name not in WITHOUT_DEFAULTS]
    parser.add_argument("--methods", nargs="+", default=[PROBE, *every], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--short", action="store_true", help="fewer rows and epochs")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/methods_table"))
    given = parser.parse_args()
    file = given.out / ("short.csv" if given.short else "results.csv")
    rows = read(file)
    known = {(row["method"], int(row["seed"])) for row in rows}
    asked = [(method, seed) for seed in given.seeds for method in given.methods if (method, seed) not in known]
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    with ThreadPoolExecutor(given.jobs) as pool:
        jobs = [pool.submit(run, method, seed, given.out, given.short, threads) for method, seed in asked]
        for job in jobs:
            try:
                rows.append(job.result())
            except RuntimeError as error:
                print(error, file=sys.stderr)
            write(file, rows)
    print_table([row for row in rows if row["method"] in given.methods and int(row["seed"]) in given.seeds])


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of earlier runs."""
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """All rows so far."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Accuracy by method, the best first, and how far each is above the probe."""
    accuracies: dict[str, list[float]] = {}
    for row in rows:
        accuracies.setdefault(row["method"], []).append(float(row["accuracy"]))
    mean = {method: statistics.mean(values) for method, values in accuracies.items()}
    table = Table(title="Best validation accuracy on the quickstart", title_justify="left")
    for header in ("method", "learning rate", "trained", "mean", "spread", "above the probe", "seconds"):
        table.add_column(header, justify="left" if header == "method" else "right")
    for method in sorted(mean, key=lambda name: -mean[name]):
        own = [row for row in rows if row["method"] == method]
        rate = "0.03" if method == PROBE else f"{METHODS[method.split()[0]].learning_rate:g}"
        spread = max(accuracies[method]) - min(accuracies[method])
        above = f"{mean[method] - mean[PROBE]:+.3f}" if PROBE in mean and method != PROBE else ""
        seconds = statistics.median(int(row["seconds"]) for row in own)
        trained = f"{int(own[0]['trainable']):,}"
        table.add_row(method, rate, trained, f"{mean[method]:.3f}", f"{spread:.3f}", above, f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
