"""Plans of modules that are no task of this package, each beside that of a plain one that does the same."""

from __future__ import annotations

import pytest
from torch import Tensor

from lightning_peft import LoRA
from lightning_peft.methods.errors import PEFTError
from lightning_peft.planning.building import Setting
from lightning_peft.planning.estimates import Estimate, Planner
from tests.planning import own
from tests.planning.own import Data, Own

SETTING = Setting(LoRA(r=2, target_modules=["up"]), modules_to_save=("head",))


def planned(module: Own, data: Data | None = None) -> Estimate:
    return Planner(module, data, on_gpu=False).estimate(SETTING)


@pytest.mark.parametrize(
    ("module", "data"),
    [(own.OfData, Data), (own.Careful, Data), (own.OfDataclasses, own.Dataclasses)],
)
def test_it_is_planned_as_a_plain_one(module: type[Own], data: type[Data]) -> None:
    made = data()
    estimate = planned(module(), made)
    assert not estimate.fault
    assert estimate == planned(Own())
    assert made.times == 1


def test_several_loaders() -> None:
    class OfPairs(Own):
        def training_step(self, batch: list[own.Pair]) -> Tensor:
            return self.loss(batch[0]) + self.loss(batch[1])

    pairs = OfPairs()
    pairs.example_input_array = [Own().example_input_array] * 2
    estimate = planned(own.OfTwoLoaders(), own.TwoLoaders())
    assert not estimate.fault
    assert estimate == planned(pairs)
    assert estimate.activations > planned(Own()).activations


def test_what_fails_before_a_step_is_told() -> None:
    class NoClasses(Data):
        def setup(self, stage: str) -> None:
            self.classes = {"train": 2}[stage]

    with pytest.raises(PEFTError) as error:
        Planner(Own(), NoClasses())
    assert str(error.value) == "plan: NoClasses can't be set up (KeyError: 'fit')"
    with pytest.raises(PEFTError) as error:
        Planner(own.OfData())
    assert str(error.value) == (
        "plan: OfData can't be set up without a run (AttributeError: 'NoneType' object has no attribute 'classes')"
    )


def test_a_length_that_has_no_place() -> None:
    assert Planner(Own(), Data(), rows=2).batch[0].shape == (2, own.LENGTH, own.WIDTH)
    with pytest.raises(PEFTError) as error:
        Planner(Own(), Data(), rows=2, length=64)
    assert str(error.value) == (
        "batch: a length can't be given to Own, whose rows are as its data or its model make them; give their number "
        "alone, such as --batch 2"
    )
