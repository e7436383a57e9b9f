"""P-tuning: what its encoders compute, and where a template puts the virtual tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import PEFTError, PTuning, adapter_per_row, disable_adapters, inject, set_adapter
from lightning_peft.injection import adapters
from lightning_peft.methods._prompts_layout import Places
from lightning_peft.methods.p_tuning import EncodedPrompt
from tests.methods.prefix_models import ENCODERS, build, inputs

N = 5
AROUND = "{prompt}{input}{prompt}"


def prompt_of(model: nn.Module, adapter_name: str = "default") -> EncodedPrompt:
    (prompt,) = (found for found in adapters(model, adapter_name).values() if isinstance(found, EncodedPrompt))
    return prompt


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def one_way(x: Tensor, weights: list[Tensor], hidden: int) -> Tensor:
    """A recurrent layer by its equations, in one direction."""
    w, u, b, c = weights
    h = s = torch.zeros(hidden, dtype=x.dtype)
    outputs = []
    for token in x:
        i, f, g, o = (w @ token + b + u @ h + c).chunk(4)
        s = f.sigmoid() * s + i.sigmoid() * g.tanh()
        h = o.sigmoid() * s.tanh()
        outputs.append(h)
    return torch.stack(outputs)


def test_the_mlp_has_three_layers_with_relu_between() -> None:
    prompt = prompt_of(inject(build("llama").double(), PTuning(num_virtual_tokens=N, hidden_size=12)))
    state = prompt.state_dict()
    hidden = linear(linear(state["prompt"], state, "mlp.0").clamp(min=0), state, "mlp.2").clamp(min=0)
    torch.testing.assert_close(prompt.table(), linear(hidden, state, "mlp.4"), atol=1e-12, rtol=1e-12)
    assert state["mlp.0.weight"].shape == (12, 32)
    assert state["mlp.2.weight"].shape == (12, 12)


def test_the_lstm_has_two_layers_both_ways_and_two_layers_on_it() -> None:
    prompt = prompt_of(inject(build("llama").double(), PTuning(num_virtual_tokens=N, hidden_size=3, encoder="lstm")))
    state = prompt.state_dict()
    x = state["prompt"]
    for layer in range(2):
        names = [f"lstm.{kind}_l{layer}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        ahead = one_way(x, [state[name] for name in names], 3)
        back = one_way(x.flip(0), [state[f"{name}_reverse"] for name in names], 3).flip(0)
        x = torch.cat([ahead, back], dim=1)
    expected = linear(linear(x, state, "mlp.0").clamp(min=0), state, "mlp.2")
    torch.testing.assert_close(prompt.table(), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("template", "n", "places"),
    [
        ("{prompt}{input}", 5, (5, 0)),
        ("{input}{prompt}", 5, (0, 5)),
        ("{prompt}{input}{prompt}", 5, (3, 2)),
        ("{prompt}{input}{prompt}", 4, (2, 2)),
        ("{prompt}{prompt}{input}{prompt}", 7, (5, 2)),
        ("{prompt}{input}{prompt}{prompt}", 7, (3, 4)),
    ],
)
def test_slots_share_the_virtual_tokens_evenly(template: str, n: int, places: tuple[int, int]) -> None:
    assert PTuning(num_virtual_tokens=n, template=template).places() == Places(*places)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("template", [AROUND, "{input}{prompt}"])
@pytest.mark.parametrize("name", ENCODERS)
def test_what_stands_behind_the_input_follows_its_last_token(name: str, template: str, padded: bool) -> None:
    model = inject(build(name).double(), PTuning(num_virtual_tokens=N, template=template))
    bare, table, before = build(name).double(), prompt_of(model).table().detach(), {AROUND: 3}.get(template, 0)
    ids, lengths = inputs(name)["input_ids"], (7, 4, 2) if padded else (7, 7, 7)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    found = model(input_ids=ids * mask, **({"attention_mask": mask} if padded else {})).logits
    positions = torch.arange(7)[None] + (name == "roberta")
    with_positions = model(input_ids=ids * mask, position_ids=positions, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        words = bare.get_input_embeddings()(ids[row, :length])
        both = torch.cat([table[:before], words, table[before:]])[None]
        expected = bare(inputs_embeds=both).logits[0, before : before + length]
        torch.testing.assert_close(found[row, :length], expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(with_positions[row, :length], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_sees_what_stands_around_its_encoder_s_input(name: str, padded: bool) -> None:
    model = inject(build(name).double(), PTuning(num_virtual_tokens=N, template=AROUND))
    bare, table = build(name).double(), prompt_of(model).table().detach()
    given = inputs(name)
    mask = torch.tensor([[1] * 7, [1] * (4 if padded else 7) + [0] * (3 if padded else 0), [1] * 7])
    found = model(**given, **({"attention_mask": mask} if padded else {})).logits
    for row in range(3):
        words = bare.get_input_embeddings()(given["input_ids"][row, : mask[row].sum()])
        both = torch.cat([table[:3], words, table[3:]])[None]
        expected = bare(inputs_embeds=both, decoder_input_ids=given["decoder_input_ids"][row : row + 1]).logits[0]
        torch.testing.assert_close(found[row], expected, atol=1e-9, rtol=1e-9)
    text = model.generate(input_ids=given["input_ids"], attention_mask=mask, do_sample=False, max_new_tokens=5)
    again = model.generate(
        input_ids=given["input_ids"], attention_mask=mask, do_sample=False, max_new_tokens=5, use_cache=False
    )
    assert torch.equal(text, again)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*ENCODERS, "t5", "bart"])
def test_rows_have_templates_of_their_own(name: str, padded: bool) -> None:
    model = inject(build(name), PTuning(num_virtual_tokens=N, template=AROUND))
    inject(model, PTuning(num_virtual_tokens=2, template="{input}{prompt}"), adapter_name="behind")
    names, given = ["behind", "default", None], inputs(name)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 5 + [0] * 2]) if padded else torch.ones(3, 7).long()
    with adapter_per_row(model, names):
        together = model(**given, **({"attention_mask": mask} if padded else {})).logits
    for row, adapter_name in enumerate(names):
        own = {key: ids[row : row + 1] for key, ids in given.items()}
        own["input_ids"] = own["input_ids"][:, : mask[row].sum()]
        set_adapter(model, adapter_name or "behind")
        if adapter_name is None:
            with disable_adapters(model):
                alone = model(**own).logits[0]
        else:
            alone = model(**own).logits[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=2e-5, rtol=1e-5)


def test_hidden_states_are_those_of_the_tokens() -> None:
    model = inject(build("bert"), PTuning(num_virtual_tokens=N, template=AROUND))
    ids, mask = inputs("bert")["input_ids"], torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 5 + [0] * 2])
    output = model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert [state.shape for state in output.hidden_states] == [(3, 7, 32)] * 3
    torch.testing.assert_close(output.hidden_states[-1], output.last_hidden_state)
    head = model.cls(output.last_hidden_state)
    torch.testing.assert_close(head, model(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prompt_behind_a_decoder_s_input_is_refused(name: str) -> None:
    with pytest.raises(PEFTError) as error:
        inject(build(name), PTuning(template=AROUND))
    assert error.value.faults == (
        "PTuning.template: in a decoder a token sees only what comes before it, and none would see a prompt behind the "
        "input; the template must end in {input}",
    )


RULE = "must be made of {prompt}, once or more, and {input}, once, and nothing else, as in '{prompt}{input}{prompt}'"


@pytest.mark.parametrize(
    ("fields", "faults"),
    [
        ({"template": "{input}"}, [f"template: '{{input}}' {RULE}"]),
        ({"template": "{prompt}"}, [f"template: '{{prompt}}' {RULE}"]),
        ({"template": ""}, [f"template: '' {RULE}"]),
        ({"template": "{prompt} {input}"}, [f"template: '{{prompt}} {{input}}' {RULE}"]),
        ({"template": "{prompt}{input}{input}"}, [f"template: '{{prompt}}{{input}}{{input}}' {RULE}"]),
        ({"template": "{prompt}{text}{input}"}, [f"template: '{{prompt}}{{text}}{{input}}' {RULE}"]),
        (
            {"template": AROUND, "num_virtual_tokens": 1},
            [f"template: '{AROUND}' has 2 slots, more than num_virtual_tokens, 1"],
        ),
        ({"encoder": "lsmt"}, ["encoder: 'lsmt' is none of mlp, lstm; did you mean 'lstm'?"]),
        (
            {"num_virtual_tokens": 0, "hidden_size": 0, "template": "x"},
            [
                "num_virtual_tokens: 0 is no number of them; at least 1",
                "hidden_size: 0 is not a width; it must be 1 or more",
                f"template: 'x' {RULE}",
            ],
        ),
    ],
)
def test_wrong_fields_are_told_with_their_rule(fields: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(PEFTError) as error:
        PTuning(**fields)
    assert error.value.faults == tuple(f"PTuning.{fault}" for fault in faults)


def test_a_mask_of_ones_is_as_none() -> None:
    model = inject(build("modernbert").double(), PTuning(num_virtual_tokens=N, template=AROUND))
    ids = inputs("modernbert")["input_ids"]
    both = [model(input_ids=ids, attention_mask=mask).logits for mask in (None, torch.ones_like(ids))]
    torch.testing.assert_close(*both, atol=1e-10, rtol=1e-10)
    words = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=words).logits, both[0], atol=1e-10, rtol=1e-10)
    padded = F.pad(ids, (0, 3))
    found = model(input_ids=padded, attention_mask=(padded != 0).long()).logits[:, :7]
    torch.testing.assert_close(found, both[0], atol=1e-10, rtol=1e-10)
