from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_peft.data.conversations import Form, prompt_tokens, tokens
from lightning_peft.data.instructions import InstructionData
from lightning_peft.data.labels import IGNORED
from lightning_peft.methods.errors import PEFTError
from tests.data.decoders import CHATML, FORGETS, MARKED, WITH_BOS, faults_of, learned_text, save_tokenizer

Write = Callable[..., str]
CHAT = [
    {"role": "system", "content": "be wise"},
    {"role": "user", "content": "the quick fox?"},
    {"role": "assistant", "content": "jumps over"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "watch the dog."},
]
CHAT_TEXT = (
    "<|im_start|>system\nbe wise<|im_end|>\n<|im_start|>user\nthe quick fox?<|im_end|>\n<|im_start|>assistant\n"
    "jumps over<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\nwatch the dog.<|im_end|>\n"
)
PAIRS = [
    {"prompt": "capital of France?", "response": "Paris."},
    {"prompt": "of Spain?", "response": "Madrid, in Spain."},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tokenizers by the name of their chat template; all of them put BOS before a text."""
    templates = {"chatml": CHATML, "marked": MARKED, "forgets": FORGETS, "bos": WITH_BOS, "none": None}
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: save_tokenizer(root / name, template, "bos") for name, template in templates.items()}


def evaluation(path: str, **options: Any) -> tuple[InstructionData, dict[str, torch.Tensor]]:
    """The datamodule, and the one batch of the rows in order."""
    data = InstructionData(path, validation_path=path, **options)
    data.setup()
    (batch,) = data.val_dataloader()
    return data, batch


def texts(data: InstructionData, batch: dict[str, torch.Tensor]) -> list[str]:
    masks = batch["attention_mask"].bool()
    return [data.tokenizer.decode(ids[mask]) for ids, mask in zip(batch["input_ids"], masks, strict=True)]


@pytest.mark.parametrize("name", ["chatml", "marked"])
def test_chat_learns_every_turn_of_the_assistant_with_its_end(name: str, write: Write, folders: dict[str, str]) -> None:
    data, batch = evaluation(write("a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:3]}]), tokenizer=folders[name])
    assert texts(data, batch) == [CHAT_TEXT, CHAT_TEXT[: CHAT_TEXT.index("<|im_start|>user\nand")]]
    learned = [learned_text(data.tokenizer, labels) for labels in batch["labels"].tolist()]
    assert learned == [["jumps over<|im_end|>", "watch the dog.<|im_end|>"], ["jumps over<|im_end|>"]]
    kept = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert batch["attention_mask"][0].all()
    assert (batch["input_ids"][1][batch["attention_mask"][1] == 0] == 0).all()
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_share_gpt_is_the_same_chat(write: Write, folders: dict[str, str]) -> None:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in CHAT]
    _, one = evaluation(write("a.jsonl", [{"messages": CHAT}]), tokenizer=folders["chatml"])
    _, other = evaluation(write("b.jsonl", [{"conversations": turns, "id": 3}]), tokenizer=folders["chatml"])
    assert {name: tensor.tolist() for name, tensor in one.items()} == {
        name: tensor.tolist() for name, tensor in other.items()
    }


WORDS = st.text(st.sampled_from("ab é\n?<|"), min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_rendering_up_to_each_turn_finds_what_marks_tell(turns: list[tuple[str, str]]) -> None:
    chat = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    plain, marked = _tokenizer(CHATML), _tokenizer(MARKED)
    ids, learned = tokens(chat, plain, chat=True)
    assert (ids, learned) == tokens(chat, marked, chat=True)
    labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
    # space that a response begins with can be in one token with the template's line break, which isn't learned
    said = [text.lstrip() for text in learned_text(plain, labels)]
    assert said == [f"{response}<|im_end|>".lstrip() for _, response in turns]
    # what is generated from is the text up to the last response
    last = plain.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt_tokens(chat, plain, chat=True) == last
    if not turns[-1][1][0].isspace():
        assert ids[: len(last)] == last


_TOKENIZERS: dict[str, Any] = {}


def _tokenizer(template: str) -> Any:
    if template not in _TOKENIZERS:
        import tempfile

        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            _TOKENIZERS[template] = AutoTokenizer.from_pretrained(save_tokenizer(Path(folder), template, "bos"))
    return _TOKENIZERS[template]


def test_prompt_and_response_go_through_the_chat_template(write: Write, folders: dict[str, str]) -> None:
    data, batch = evaluation(write("a.csv", PAIRS), tokenizer=folders["chatml"], system="be wise")
    assert texts(data, batch)[0] == (
        "<|im_start|>system\nbe wise<|im_end|>\n<|im_start|>user\ncapital of France?<|im_end|>\n"
        "<|im_start|>assistant\nParis.<|im_end|>\n"
    )
    assert learned_text(data.tokenizer, batch["labels"][0].tolist()) == ["Paris.<|im_end|>"]


def test_a_system_turn_of_the_row_stays(write: Write, folders: dict[str, str]) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT[1:3]}]
    data, batch = evaluation(write("a.jsonl", rows), tokenizer=folders["chatml"], system="be brief")
    assert [text.splitlines()[1] for text in texts(data, batch)] == ["be wise<|im_end|>", "be brief<|im_end|>"]


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
def test_without_a_chat_template_the_response_follows_the_prompt_and_ends_in_one_eos(
    adds: str, write: Write, tmp_path: Path
) -> None:
    folder = save_tokenizer(tmp_path / "t", None, adds)
    data, batch = evaluation(write("a.jsonl", PAIRS), tokenizer=folder)
    start = "<s>" if "bos" in adds else ""
    assert texts(data, batch) == [f"{start}capital of France?Paris.</s>", f"{start}of Spain?Madrid, in Spain.</s>"]
    learned = [learned_text(data.tokenizer, labels) for labels in batch["labels"].tolist()]
    assert learned == [["Paris.</s>"], ["Madrid, in Spain.</s>"]]


def test_a_template_fills_columns_in_and_no_chat_template_is_used(write: Write, folders: dict[str, str]) -> None:
    rows = [
        {"ask": "the {capital}?", "more": "", "response": "Paris."},
        {"ask": "and", "more": "Spain", "response": "Madrid"},
    ]
    template = "### Question: {ask}\n{more}\n### Answer: "
    data, batch = evaluation(write("a.jsonl", rows), tokenizer=folders["chatml"], template=template)
    assert texts(data, batch) == [
        "<s>### Question: the {capital}?\n\n### Answer: Paris.</s>",
        "<s>### Question: and\nSpain\n### Answer: Madrid</s>",
    ]
    # a token of a word and the space before it belongs to the word
    learned = [learned_text(data.tokenizer, labels) for labels in batch["labels"].tolist()]
    assert learned == [[" Paris.</s>"], [" Madrid</s>"]]


def test_bos_is_not_doubled(write: Write, folders: dict[str, str]) -> None:
    data, batch = evaluation(write("a.jsonl", [{"messages": CHAT[1:]}]), tokenizer=folders["bos"])
    (text,) = texts(data, batch)
    assert text == "<s>[INST] the quick fox? [/INST] jumps over</s>[INST] and then? [/INST] watch the dog.</s>"
    assert learned_text(data.tokenizer, batch["labels"][0].tolist()) == [" jumps over</s>", " watch the dog.</s>"]
    (prompt,) = next(iter(data.predict_dataloader()))["input_ids"]
    assert data.tokenizer.decode(prompt) == text[: -len(" watch the dog.</s>")]


@pytest.mark.parametrize("as_file", [False, True])
def test_a_chat_template_of_ones_own(as_file: bool, write: Write, tmp_path: Path, folders: dict[str, str]) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "chat.jinja").write_text(template)
    given = str(tmp_path / "chat.jinja") if as_file else template
    for name in ("none", "marked"):
        data, batch = evaluation(write("a.jsonl", [{"messages": CHAT}]), tokenizer=folders[name], chat_template=given)
        text = "<system>be wise<user>the quick fox?<assistant>jumps over<user>and then?<assistant>watch the dog."
        assert texts(data, batch) == [text]
        assert learned_text(data.tokenizer, batch["labels"][0].tolist()) == ["jumps over", "watch the dog."]


def test_long_responses_are_cut_and_counted(
    write: Write, folders: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "dog", "response": "owls " * length} for length in (1, 50, 60)]
    with caplog.at_level("INFO"):
        data, batch = evaluation(write("a.jsonl", rows), tokenizer=folders["none"], max_length=20)
    assert data.cut_rows == {"train": 2, "validation": 2}
    assert "validation: 2 of 3 rows (66.7%) are longer than max_length=20 tokens and were cut" in caplog.text
    assert batch["attention_mask"].sum(1).tolist()[1:] == [20, 20]
    assert (batch["labels"] == 2).sum().item() == 1


@pytest.mark.parametrize("packing", [False, True])
def test_prompts_that_leave_no_room_are_refused_with_their_rows_or_dropped(
    packing: bool, write: Write, folders: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "owls " * (40 if number % 5 == 2 else 1), "response": f"dog {number}"} for number in range(40)]
    path = write("a.jsonl", rows)
    options: dict[str, Any] = {"tokenizer": folders["none"], "max_length": 16, "packing": packing}
    # the split shuffles the rows; their numbers are still those in the file
    (message,) = faults_of(InstructionData(path, **options, validation_fraction=0.05))
    pattern = (
        r"max_length: in (\d) of 38 rows of the train data the prompt alone fills 16 tokens, and nothing of the "
        r"response would be learned: rows (.*), …; raise max_length, or leave them out with drop_long=True"
    )
    found = re.fullmatch(pattern, message)
    assert found is not None
    assert 6 <= int(found[1]) <= 8
    numbers = [int(number) for number in found[2].split(", ")]
    assert numbers == sorted(numbers)
    assert set(numbers) <= {3 + 5 * step for step in range(8)}
    with caplog.at_level("INFO"):
        data = InstructionData(path, validation_path=path, **options, drop_long=True)
        data.setup()
    assert data.dropped_rows == {"train": 8, "validation": 8}
    assert data.cut_rows["train"] == 0
    assert "train: in 8 of 40 rows the prompt alone fills max_length=16 tokens, and they were left out" in caplog.text
    said = [
        text
        for batch in data.val_dataloader()
        for labels in batch["labels"].tolist()
        for text in learned_text(data.tokenizer, labels)
    ]
    assert sorted(said) == sorted(f" dog {number}</s>" for number in range(40) if number % 5 != 2)
    prompts = torch.cat([batch["attention_mask"].sum(1) for batch in data.predict_dataloader()])
    assert len(prompts) == 40
    assert prompts.max() == 16


def test_nothing_left_is_refused(write: Write, folders: dict[str, str]) -> None:
    path = write("a.jsonl", [{"prompt": "owls " * 40, "response": "dog"}] * 3)
    data = InstructionData(path, tokenizer=folders["none"], max_length=16, drop_long=True, validation_fraction=0)
    assert faults_of(data) == ["path: the train data has no row that anything can be learned from"]


def test_prompts_to_predict_from_are_padded_on_the_left(write: Write, folders: dict[str, str]) -> None:
    data, _ = evaluation(
        write("a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:3]}]), tokenizer=folders["chatml"], packing=True
    )
    (batch,) = data.predict_dataloader()
    assert sorted(batch) == ["attention_mask", "input_ids"]
    long, short = batch["attention_mask"].tolist()
    assert 0 not in long
    assert short == sorted(short)
    assert texts(data, batch) == [
        CHAT_TEXT[: -len("watch the dog.<|im_end|>\n")],
        CHAT_TEXT[: CHAT_TEXT.index("jumps")],
    ]


def test_test_prompts_without_responses_serve_for_prediction(write: Write, folders: dict[str, str]) -> None:
    bare = write("bare.jsonl", [{"prompt": pair["prompt"]} for pair in PAIRS])
    for name, end in (("none", ""), ("chatml", "<|im_end|>\n<|im_start|>assistant\n")):
        data = InstructionData(write("a.jsonl", PAIRS), test_path=bare, tokenizer=folders[name])
        data.setup()
        (batch,) = data.predict_dataloader()
        assert [text.endswith(pair["prompt"] + end) for text, pair in zip(texts(data, batch), PAIRS, strict=True)] == [
            True
        ] * 2
        with pytest.raises(PEFTError) as caught:
            data.test_dataloader()
        assert str(caught.value) == "response_column: the test data has no column 'response'; only predict on it"


def test_filler_rows_have_no_labels(write: Write, folders: dict[str, str]) -> None:
    data, _ = evaluation(write("a.jsonl", PAIRS), tokenizer=folders["none"])
    row = data._encoded["validation"][0]
    assert set(data.filler(row)["labels"]) == {IGNORED}
    assert data.filler(row)["input_ids"] == row["input_ids"]


def test_every_wrong_argument_is_told_at_once() -> None:
    def told(**options: Any) -> list[str]:
        with pytest.raises(PEFTError) as caught:
            InstructionData("a.jsonl", **options)
        return list(caught.value.faults)

    assert told(template="Question:", system="a", chat_template="{{ b }}", batch_size=0) == [
        "template: 'Question:' has no slot for a column, as in {prompt}",
        "system: a chat template is not used with `template`; give one of them",
        "chat_template: a chat template is not used with `template`; give one of them",
        "batch_size: 0 is less than 1",
    ]
    assert told(template="{a") == ["template: '{a' is no format string: expected '}' before end of string"]
    assert told(template="{} {a.__class__}") == [
        "template: the slot {} is no column's name",
        "template: the slot {a.__class__} is no column's name",
    ]


def test_missing_columns_are_told_with_the_nearest(write: Write, folders: dict[str, str]) -> None:
    def told(rows: list[dict[str, Any]], **options: Any) -> list[str]:
        return faults_of(InstructionData(write("a.jsonl", rows), tokenizer=folders["chatml"], **options))

    assert told([{"promt": "a", "answer": "b"}]) == [
        "prompt_column: the train data has no column 'prompt'; did you mean 'promt'?",
        "response_column: the train data has no column 'response'; it has promt, answer",
    ]
    assert told([{"question": "a", "response": "b"}], template="{qestion}") == [
        "template: the train data has no column 'qestion'; did you mean 'question' or 'response'?"
    ]
    assert told([{"messages": CHAT}], template="{a}") == [
        "template: the train data is chat, with the column 'messages', and needs none"
    ]


def test_faulty_rows_are_told_by_kind_and_number(write: Write, folders: dict[str, str]) -> None:
    def told(rows: list[dict[str, Any]], **options: Any) -> list[str]:
        return faults_of(InstructionData(write("a.jsonl", rows), tokenizer=folders["chatml"], **options))

    good = {"prompt": "a", "response": "b"}
    assert told(
        [good, {"prompt": " ", "response": "b"}, {"prompt": None, "response": ""}, {"prompt": "a"}, *[good] * 9]
    ) == [
        "prompt_column: 2 of 13 rows of the train data have no text in 'prompt': rows 2, 3",
        "response_column: 1 of 13 rows of the train data have no text in 'response': row 4",
    ]
    rows = [{"a": "x", "b": 1, "response": "z"}, {"a": None, "b": 1, "response": "z"}]
    assert told(rows, template="{a}{b}") == ["template: 1 of 2 rows of the train data have nothing in 'a': row 2"]
    chats: list[Any] = [
        CHAT,
        [{"role": "user", "content": "a"}],
        [{"role": "usr", "content": "a"}, CHAT[2]],
        [CHAT[1], {"role": "assistant", "content": " "}],
        [],
        None,
        CHAT,
    ]
    assert told([{"messages": chat} for chat in chats]) == [
        "messages_column: 1 of 7 rows of the train data have no turn of the assistant in 'messages': row 2",
        "messages_column: 1 of 7 rows of the train data have a turn of the unknown role 'usr'; "
        "did you mean 'user'?: row 3",
        "messages_column: 1 of 7 rows of the train data have a turn of the assistant without text: row 4",
        "messages_column: 2 of 7 rows of the train data have no list of turns in 'messages': rows 5, 6",
    ]
    assert told([{"messages": "a chat"}]) == [
        "messages_column: 1 of 1 rows of the train data have no list of turns in 'messages': row 1"
    ]


def test_templates_that_do_not_serve_are_refused(write: Write, tmp_path: Path, folders: dict[str, str]) -> None:
    path = write("a.jsonl", [{"messages": CHAT}] * 2)

    def told(name: str, source: str = path, **options: Any) -> str:
        (fault,) = faults_of(InstructionData(source, tokenizer=folders[name], validation_fraction=0, **options))
        return fault

    assert told("none") == (
        "chat_template: the train data is chat, and the tokenizer has no chat template; give a Jinja template or a "
        "file with one, or use the tokenizer of a model that was made for chat"
    )
    assert told("forgets") == (
        "chat_template: row 1 has a beginning, up to turn 3, that the chat template renders differently once more "
        "turns follow, so where the assistant's are can't be told; give a chat_template that puts them between "
        "{% generation %} and {% endgeneration %}"
    )
    assert told("chatml", chat_template="{% for") == (
        "chat_template: row 1 has a conversation that the chat template refuses (unexpected 'end of template')"
    )
    refusing = "{{ raise_exception('no system turns here') }}"
    assert told("chatml", chat_template=refusing).endswith("that the chat template refuses (no system turns here)")
    assert told("chatml", chat_template="chta.jinja") == (
        "chat_template: 'chta.jinja' is neither a file nor a Jinja template, which has {{ or {% in it"
    )
    silent = "{% generation %}{% endgeneration %}{{ messages[0].content }}"
    assert told("chatml", chat_template=silent) == (
        "chat_template: row 1 has no token that the chat template shows to be the assistant's"
    )
    pairs = write("b.jsonl", PAIRS)
    assert told("none", pairs, system="a") == (
        "system: the tokenizer has no chat template to put it into; give one, or use `template`"
    )


def test_slow_tokenizers_are_refused(write: Write, tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    folder = str(tmp_path / "slow")
    ByT5Tokenizer().save_pretrained(folder)
    (tmp_path / "slow" / "config.json").write_text('{"model_type": "t5"}')
    assert faults_of(InstructionData(write("a.jsonl", PAIRS), tokenizer=folder)) == [
        f"tokenizer: that of {folder!r} doesn't tell where in a text its tokens are; use a fast one"
    ]


def test_empty_and_malformed_files_are_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    empty, malformed = tmp_path / "empty.jsonl", tmp_path / "malformed.jsonl"
    empty.touch()
    malformed.write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    for streaming in (False, True):
        options: dict[str, Any] = {"tokenizer": folders["none"], "streaming": streaming}
        assert faults_of(InstructionData(str(empty), **options)) == [f"path: '{empty}' is empty"]
        assert faults_of(InstructionData(str(malformed), **options)) == [
            f"path: {malformed}, line 2: not JSON: Expecting value at character 11"
        ]


def test_a_form_tells_the_columns_that_it_reads() -> None:
    assert Form(None, "p", None, "r", None).columns == ["p", "r"]
    assert Form(None, "p", "{a} {b} {a}", "r", None).columns == ["a", "b", "r"]
    assert Form("m", "p", None, None, None).columns == ["m"]
