"""What ranks find, in runs that the tests of a worker share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import PEFT, LoRA
from tests.processes import run_ranks
from tests.strategies import language


class OfRanks:
    """Runs some ranks, which write what they found into files, and reads it.

    Args:
        folder: for the files.
        words: of the command, without the folder.
        things: names of the functions to run; all, where none is named.
        count: of the ranks.
        environment: variables of theirs.
    """

    def __init__(
        self, folder: Path, words: Sequence[str], things: Sequence[str] = (), count: int = 2, **environment: object
    ) -> None:
        self.folder, self.count = folder, count
        self._failure = ""
        try:
            run_ranks(folder, [*words, folder, *things], count, timeout=400, **environment)
        except AssertionError as error:
            self._failure = str(error)

    def __call__(self, name: str) -> list[dict[str, Any]]:
        """What each rank found, by the name of the function."""
        paths = [self.folder / f"{name}.{rank}.pt" for rank in range(self.count)]
        assert all(path.exists() for path in paths), self._failure
        of_ranks = [torch.load(path, weights_only=True) for path in paths]
        for of_rank in of_ranks:
            assert "error" not in of_rank, of_rank["error"]
        return of_ranks


@pytest.fixture(scope="session")
def of_ddp(tmp_path_factory: pytest.TempPathFactory) -> OfRanks:
    """What two ranks of ranks.py found."""
    return OfRanks(tmp_path_factory.mktemp("ddp"), ["-m", "tests.strategies.ranks"])


@pytest.fixture(scope="session")
def from_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a first epoch on one device, in the folder for what four ranks find."""
    folder = tmp_path_factory.mktemp("four")
    fitting = language.run(folder, "auto", peft=PEFT(LoRA(r=4)))
    fitting.fit(language.Language(lr=1e-3), language.text())
    fitting.save_checkpoint(folder / "single.ckpt")
    return folder / "single.ckpt"


@pytest.fixture(scope="session")
def of_four(from_one: Path) -> OfRanks:
    """What four ranks of split.py found."""
    return OfRanks(from_one.parent, ["-m", "tests.strategies.split"], count=4)
