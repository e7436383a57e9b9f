"""`lightning-peft compare`: what it plans and refuses, how it goes on, and a real comparison that is interrupted."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_peft.cli import compare
from lightning_peft.cli.children import ChildInterrupted, last_lines, run_child
from lightning_peft.cli.compare_plan import Logging, ReadingCLI, facts_of, labels_of, metric_of, plan, resolve
from lightning_peft.methods import METHODS
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tracking.comparison import results
from tests.tracking.made_up import report
from tests.tracking.wandb_records import offline, recorded

from .conftest import Command

LORA = ["--config", "lora.yaml"]
Child = Callable[[list[str], Path], int]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Lets no process start: runs write a made-up report, those with `IA3` in their name fail; gives the folders of
    those that were started."""
    started: list[Path] = []

    def run_child(words: list[str], log: Path, tick: Callable[[], None]) -> int:
        assert words == ["fit", "--config", str(log.parent / "config.yaml")]
        started.append(log.parent)
        log.write_text("loading\nTraceback:\nRuntimeError: a bug of the module\n")
        if "IA3" in log.parent.name:
            return 1
        seed = int(log.parent.name[-1])
        made = report(0.7 if "LoRA" in log.parent.name else 0.6, metric="val_accuracy", seed=seed)
        (log.parent / "report.json").write_text(json.dumps(made))
        return 0

    monkeypatch.setattr(compare, "run_child", run_child)
    # it takes half a second, and is looked at elsewhere
    monkeypatch.setattr(results, "page", lambda comparison: "<!DOCTYPE html>")
    return started


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def test_all_that_is_missing_or_wrong_is_told_before_any_run(command: Command, children: list[Path]) -> None:
    code, out, err = command("compare", "--seeds", "0,x", "--wandb_group", "g")
    assert (code, out) == (2, "")
    assert err == (
        "lightning-peft: 5 faults\n"
        "  --methods: is missing\n"
        "  --out: is missing\n"
        "  --config: is missing\n"
        "  --seeds: 'x' is no whole number of at least 0\n"
        "  --wandb_group: is of no use without --wandb_project\n"
    )
    code, _, err = command("compare", *LORA, "--methods", "lora,IA3,probes", "--out", "out")
    assert (code, err) == (
        2,
        "lightning-peft: 2 faults\n"
        "  --methods: there is no method 'lora'; did you mean 'LoRA'?\n"
        "  --methods: there is no method 'probes'; did you mean 'probe'?\n",
    )
    code, _, err = command("compare", *LORA, "--methods", "LoRA,full", "--out", "out", "--model.widht", "3")
    assert (code, err) == (
        2,
        "lightning-peft: command line: model.init_args.widht: Toy has no 'widht'; did you mean 'width'?\n",
    )
    # a fault of one method alone names it
    words = [*LORA, "--methods", "LoRA,Hybrid,full", "--out", "out", "--peft.base_weights", "w.safetensors"]
    code, _, err = command("compare", *words)
    assert code == 2
    assert "full: peft.base_weights: is of no use without a method" in err
    assert "Hybrid: " in err
    assert "methods: is missing" in err
    assert not Path("out").exists()
    assert children == []


def test_a_missing_package_is_told_with_its_extra(
    command: Command, children: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = ["compare", *LORA, "--methods", "LoRA", "--out", "out", "--wandb_project", "p"]
    assert command(*words)[::2] == (
        2,
        "lightning-peft: 2 faults\n"
        "  plotly is not installed; pip install 'lightning-peft[compare]'\n"
        "  wandb is not installed; pip install 'lightning-peft[wandb]'\n",
    )


def test_help_is_of_this_verb(command: Command) -> None:
    code, out, _ = command("compare", "--help")
    assert code == 0
    assert "variant.yaml" in out
    assert "compare" in command("--help")[1]


def test_names_and_files_become_labels(folder: Path) -> None:
    every = labels_of(["all"])
    assert list(every) == [name for name in METHODS if name not in ("HFPeft", "Hybrid")]
    assert labels_of(["probe,LoRA", "full", "x/wide.yaml,LoRA"]) == {
        "probe": "probe",
        "LoRA": "LoRA",
        "full": "full",
        "wide": "x/wide.yaml",
    }
    with pytest.raises(PEFTError, match=r"LoRA and x/LoRA.yaml would both be called 'LoRA'; rename the file"):
        labels_of(["LoRA,x/LoRA.yaml"])
    with pytest.raises(PEFTError, match="names no method"):
        labels_of([","])


def test_each_run_has_its_method_its_seed_its_folder_and_all_else_alike(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    Path("base.yaml").write_text(
        Path("lora.yaml").read_text().replace("  modules_to_save", "  quantization: nf4\n  modules_to_save")
        + "  gradient_checkpointing: true\n"
    )
    Path("wide.yaml").write_text(
        "peft: {method: {class_path: LoRA, init_args: {r: 7}}}\nmodel: {init_args: {width: 16}}\n"
    )
    saver = {
        "class_path": "ModelCheckpoint",
        "init_args": {"monitor": "val_accuracy", "mode": "max", "dirpath": "kept"},
    }
    words = ["--config", "base.yaml", "--trainer.callbacks", json.dumps([saver]), "--trainer.max_epochs", "3"]
    sources = labels_of(["LoRA,DoRA,full,probe,wide.yaml"])
    sections = resolve(sources, words)
    planned = plan(sections, [4, 5], Path("out"), Logging("project", "group"))
    assert [(run.label, run.seed) for run in planned] == [(label, seed) for seed in (4, 5) for label in sources]
    read = {(run.label, run.seed): run.config for run in planned}
    methods = {label: read[label, 4]["peft"]["method"] for label in sources}
    assert methods["LoRA"]["init_args"]["r"] == 2
    # the fields of LoRA are LoRA's alone
    assert (methods["DoRA"]["class_path"], methods["DoRA"]["init_args"]["r"]) == ("lightning_peft.DoRA", 8)
    assert methods["wide"]["init_args"]["r"] == 7
    assert methods["full"] is None
    assert methods["probe"]["class_path"] == "lightning_peft.methods._probe.LinearProbe"
    assert {label: read[label, 4]["peft"]["quantization"] for label in sources} == {
        **dict.fromkeys(sources, "nf4"),
        "full": None,
    }
    assert read["full", 4]["peft"]["gradient_checkpointing"] is False
    for (label, seed), config in read.items():
        place = f"out/runs/{label}-seed{seed}"
        assert config["seed_everything"] == seed
        assert config["model"]["init_args"]["width"] == (16 if label == "wide" else 8)
        trainer = config["trainer"]
        assert (trainer["max_epochs"], trainer["default_root_dir"], trainer["enable_progress_bar"]) == (3, place, False)
        assert trainer["callbacks"][0]["init_args"]["dirpath"] == f"{place}/checkpoints"
        assert trainer["callbacks"][-1]["init_args"] == {"path": f"{place}/report.json"}
        csv_logger, wandb_logger = trainer["logger"]
        assert csv_logger["init_args"]["save_dir"] == place
        assert (wandb_logger["init_args"]["project"], wandb_logger["init_args"]["name"]) == (
            "project",
            f"{label}-seed{seed}",
        )
        assert wandb_logger["dict_kwargs"] == {"group": "group", "job_type": label}
    assert metric_of(sections, None, None) == ("val_accuracy", "max")
    assert metric_of(sections, "val_loss", None) == ("val_loss", "min")
    assert metric_of(sections, "val_loss", "max") == ("val_loss", "max")
    assert facts_of(sections) == {"model": "Toy", "data": "ToyData", "budget": "3 epochs"}
    # the file that is written is one that `fit` reads, and means the same
    run = planned[0]
    run.folder.mkdir(parents=True)
    run.file.write_text(run.text)
    again = ReadingCLI(["fit", "--config", str(run.file)]).section()
    assert again == {**run.config, "trainer": {**run.config["trainer"], "logger": again["trainer"]["logger"]}}
    logger = again["trainer"]["logger"][1]
    # the parser may find by itself that wandb takes these
    arguments = {**logger["init_args"], **logger.get("dict_kwargs", {})}
    assert (arguments["group"], arguments["job_type"]) == ("group", "LoRA")


def test_a_learning_rate_is_what_suits_each_method_unless_one_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    model = "model: {class_path: SequenceClassification, init_args: {model: somewhere}}\n"
    Path("task.yaml").write_text(model + "data: {class_path: cli_toy.ToyData}\n")
    sources = labels_of(["LoRA,IA3,full,probe"])
    sections = resolve(sources, ["--config", "task.yaml"])
    rates = {label: section["model"]["init_args"]["learning_rate"] for label, section in sections.items()}
    assert rates == {"LoRA": 1e-3, "IA3": 3e-2, "full": None, "probe": 3e-2}
    sections = resolve(sources, ["--config", "task.yaml", "--model.learning_rate", "5e-4"])
    assert {section["model"]["init_args"]["learning_rate"] for section in sections.values()} == {5e-4}
    assert metric_of(sections, None, None) == ("val_loss", "min")


def test_a_callback_in_the_trainer_can_not_be_exchanged(command: Command, children: list[Path]) -> None:
    words = ["compare", "--config", "base.yaml", "--trainer.callbacks+=PEFT", "--trainer.callbacks.method=LoRA"]
    code, _, err = command(*words, "--methods", "LoRA,full", "--out", "out")
    assert (code, err) == (
        2,
        "lightning-peft: trainer.callbacks: has a PEFT callback, whose method can't be exchanged; write it as section "
        "peft\n",
    )
    assert children == []


def test_runs_that_ended_well_are_not_run_again_and_a_failure_ends_nothing(
    command: Command, children: list[Path]
) -> None:
    words = ["compare", *LORA, "--methods", "LoRA,IA3", "--seeds", "0,1", "--out", "out", "--metric", "val_accuracy"]
    code, out, _ = command(*words)
    order = ["LoRA-seed0", "IA3-seed0", "LoRA-seed1", "IA3-seed1"]
    assert (code, names(children)) == (1, order)
    assert out.startswith("[1/4] LoRA, seed 0: out/runs/LoRA-seed0\n    val_accuracy 0.7\n[2/4] IA3, seed 0")
    assert "    failed: RuntimeError: a bug of the module\n" in out
    lines = out.splitlines()
    assert lines[-6:-3] == [
        "Best val_accuracy: LoRA with 0.700 (mean of 2 seeds, spread 0.000).",
        "Smallest as good: LoRA with 341,000 parameters (no smaller one is within its spread).",
        "Fastest: LoRA with 200 ms for a step (val_accuracy 0.700).",
    ]
    assert lines[-3:] == [
        "Failed: IA3, seed 0: RuntimeError: a bug of the module",
        "Failed: IA3, seed 1: RuntimeError: a bug of the module",
        "Results  out/results.html, and .md, .csv and .json beside it",
    ]
    content = json.loads(Path("out/results.json").read_text())
    assert content["command"] == f"lightning-peft {' '.join(words)}"
    [first, _] = content["failures"]
    assert first["why"].endswith(
        "RuntimeError: a bug of the module\n(ended with exit code 1; out/runs/IA3-seed0/log.txt)"
    )

    # again, with a method that is new
    children.clear()
    code, out, _ = command(*words[:4], "LoRA,full", *words[5:])
    assert (code, names(children)) == (0, ["full-seed0", "full-seed1"])
    assert "[1/4] LoRA, seed 0: was there already\n" in out
    assert "IA3" not in Path("out/results.csv").read_text()

    # what failed is run once more, wherever the folder is called from
    children.clear()
    code, _, _ = command(*words[:-3], str(Path("out").absolute()), *words[-2:])
    assert (code, names(children)) == (1, ["IA3-seed0", "IA3-seed1"])


def test_a_run_of_another_configuration_is_not_deleted(command: Command, children: list[Path]) -> None:
    words = ["compare", *LORA, "--methods", "LoRA,IA3", "--out", "out", "--metric", "val_accuracy"]
    command(*words)
    children.clear()
    code, out, err = command(*words, "--trainer.max_epochs", "2", "--model.width", "16")
    assert (code, out, children) == (2, "", [])
    assert err == (
        "lightning-peft: --out: out/runs/LoRA-seed0 holds a run that differs in trainer.max_epochs, "
        "model.init_args.width; give another --out, or delete it\n"
    )
    # one that has not ended well begins anew
    code, _, _ = command(*words[:4], "IA3", *words[5:], "--trainer.max_epochs", "2")
    assert (code, names(children)) == (1, ["IA3-seed0"])


def test_a_bar_of_the_configuration_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    callbacks = [{"class_path": name} for name in ("RichProgressBar", "LearningRateMonitor", "TQDMProgressBar")]
    sections = resolve(labels_of(["LoRA"]), [*LORA, "--trainer.callbacks", json.dumps(callbacks)])
    [run] = plan(sections, [0], Path("out"), None)
    kept = [callback["class_path"].rpartition(".")[2] for callback in run.config["trainer"]["callbacks"]]
    assert kept == ["LearningRateMonitor", "RunReport"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("name", "is_ignored"), [("SIGTERM", False), ("SIGHUP", False), ("SIGHUP", True)])
def test_a_closed_terminal_ends_the_child_but_not_under_nohup(name: str, is_ignored: bool, tmp_path: Path) -> None:
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    told: list[int] = []

    def tick() -> None:
        if not told:
            told.append(number)
            os.kill(os.getpid(), number)

    try:
        if is_ignored:
            assert run_child(["methods"], tmp_path / "log.txt", tick) == 0
            assert "LoRA" in (tmp_path / "log.txt").read_text()
        else:
            with pytest.raises(ChildInterrupted):
                run_child(["methods"], tmp_path / "log.txt", tick)
            assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_run_begins_in_a_folder_without_remains(command: Command, children: list[Path]) -> None:
    words = ["compare", *LORA, "--methods", "LoRA", "--out", "out"]
    command(*words)
    remains = Path("out/runs/LoRA-seed0/checkpoints/old.ckpt")
    remains.parent.mkdir()
    remains.touch()
    Path("out/runs/LoRA-seed0/report.json").write_text("{")  # half of one
    command(*words)
    assert names(children) == ["LoRA-seed0", "LoRA-seed0"]
    assert not remains.exists()


def test_an_interruption_leaves_the_results_so_far(
    command: Command, children: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = compare.run_child

    def run_child(words: list[str], log: Path, tick: Callable[[], None]) -> int:
        if "full" in log.parent.name:
            raise ChildInterrupted
        return done(words, log, tick)

    monkeypatch.setattr(compare, "run_child", run_child)
    words = ["compare", *LORA, "--methods", "LoRA,full,probe", "--out", "my out", "--metric", "val_accuracy"]
    code, _, err = command(*words)
    assert code == 130
    assert err == (
        "\nInterrupted in full fine-tuning, seed 0, which will begin anew. 1 of 3 runs have ended.\n"
        "To go on: lightning-peft compare --config lora.yaml --methods LoRA,full,probe --out 'my out' "
        "--metric val_accuracy\n"
    )
    content = json.loads(Path("my out/results.json").read_text())
    assert [run["state"] for run in content["runs"]] == ["finished", "not run", "not run"]
    assert content["failures"] == []


def test_a_report_without_the_metric_is_a_failure(command: Command, children: list[Path]) -> None:
    code, out, _ = command("compare", *LORA, "--methods", "LoRA", "--out", "out", "--metric", "val_f1")
    assert code == 1
    assert "Failed: LoRA, seed 0: val_f1 was not logged; there are val_accuracy, val_loss\n" in out


def test_of_a_log_the_last_lines_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_lines(log) == ""
    log.write_text("".join(f"line {number}\n" for number in range(102)) + "\n10%\r50%\r\x1b[31m100%\x1b[0m\n\n")
    assert last_lines(log).splitlines() == [*(f"line {number}" for number in range(78, 102)), "100%"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("devices")
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_a_real_comparison_goes_on_after_an_interruption(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["compare", *LORA, "--methods", "full,LoRA", "--seeds", "3", "--out", "out", "--metric", "val_accuracy"]
    words += ["--model.pause", "0.05", "--trainer.max_epochs", "30", "--wandb_project", "toys"]
    runs, stop = Path("out/runs").absolute(), threading.Event()

    def interrupt() -> None:
        log = runs / "LoRA-seed3" / "log.txt"
        while not (log.exists() and "trainable params: " in log.read_text()):
            if stop.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    try:
        with offline(tmp_path / "wandb"):
            code, out, err = command(*words)
    finally:
        stop.set()
        watcher.join()
    assert code == 130, out + err
    assert "Interrupted in LoRA, seed 3, which will begin anew. 1 of 2 runs have ended.\n" in err
    # the child was told to end, and has ended as a run in a terminal does
    assert "Interrupted in epoch " in (runs / "LoRA-seed3" / "log.txt").read_text()
    assert not (runs / "LoRA-seed3" / "report.json").exists()
    first = (runs / "full-seed3" / "report.json").stat().st_mtime_ns

    with offline(tmp_path / "wandb"):
        code, out, err = command(*words)
    assert (code, err) == (0, ""), out + err
    assert "[1/2] full fine-tuning, seed 3: was there already\n" in out
    assert (runs / "full-seed3" / "report.json").stat().st_mtime_ns == first
    found = {label: json.loads((runs / f"{label}-seed3/report.json").read_text()) for label in ("full", "LoRA")}
    assert {label: made["seed"] for label, made in found.items()} == {"full": 3, "LoRA": 3}
    assert {label: made["method"] for label, made in found.items()} == {"full": None, "LoRA": "LoRA"}
    assert found["LoRA"]["steps"] == found["full"]["steps"] == 60
    content = json.loads(Path("out/results.json").read_text())
    assert {row["label"]: row["trainable"] for row in content["methods"]} == {"full": 2 * 72 + 18, "LoRA": 2 * 32 + 18}
    assert [row["quality"]["mean"] for row in content["methods"]] == [0.75, 0.75]
    for label in ("full", "LoRA"):
        with (runs / f"{label}-seed3" / "logs" / "metrics.csv").open(newline="") as file:
            assert any(row["val_accuracy"] == "0.75" for row in csv.DictReader(file))
    logged = recorded(runs)
    assert [run.group for run in logged] == ["out", "out"]  # of the interrupted run nothing is left
    assert [run.exit_code for run in logged] == [0, 0]
