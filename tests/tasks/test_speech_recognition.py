from __future__ import annotations

import itertools
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft.data.characters import character_tokenizer, vocabulary_of
from lightning_peft.data.speech_recognition import SpeechRecognitionData
from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.speech_recognition import SpeechRecognition, blank_of, heard, spelled
from lightning_peft.tasks.task import Outcome
from tests.stand_ins import save_spoken
from tests.tasks.test_generation import distance
from tests.tasks.writers import trainer

TEXTS = ["ab cad", "da", "c dab", "bad ac", "cab", "a b", "dac", "bcd a", "cd", "ba dab", "ca", "adb c"]
VOCABULARY = ["<pad>", "<unk>", "|", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def tiny_wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a randomly initialised wav2vec 2.0 for 8,000 samples per second, whose extractor masks padding."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    folder = str(tmp_path_factory.mktemp("tiny_wav2vec2"))
    config = Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_kernel=(40, 16),
        conv_stride=(20, 8),
        feat_extract_norm="layer",
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        mask_time_prob=0.0,
        layerdrop=0.0,
        **{f"{part}_dropout": 0.0 for part in ("hidden", "attention", "activation", "feat_proj", "final")},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_spoken(tmp_path_factory.mktemp("spoken") / "spoken", TEXTS)


def data(folder: str, **options: Any) -> SpeechRecognitionData:
    return SpeechRecognitionData(folder, validation_path=folder, test_path=folder, **{"batch_size": 4, **options})


@pytest.mark.usefixtures("datasets_cache")
def test_fit_learns_to_spell_and_load_from_checkpoint_gives_the_model_back(
    tiny_wav2vec2: str, spoken: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module, rows = SpeechRecognition(tiny_wav2vec2, learning_rate=1e-2), data(spoken)
    loops = trainer(tmp_path, max_epochs=40, check_val_every_n_epoch=40)
    loops.fit(module, rows)
    assert loops.callback_metrics["val_loss"] < 0.2
    assert (loops.callback_metrics["val_wer"], loops.callback_metrics["val_cer"]) == (0, 0)
    assert module.hparams["vocabulary"] == VOCABULARY
    assert (module.model.config.vocab_size, module.model.config.pad_token_id) == (7, 0)

    loops.save_checkpoint(tmp_path / "model.ckpt")
    again = SpeechRecognition.load_from_checkpoint(tmp_path / "model.ckpt")
    written = trainer(tmp_path).predict(again, rows)
    assert list(itertools.chain(*written)) == TEXTS  # type: ignore[arg-type]
    # texts of a loader without a datamodule, by the vocabulary of the hyper-parameters
    assert trainer(tmp_path).predict(again, rows.predict_dataloader()) == written


@pytest.mark.usefixtures("datasets_cache")
def test_loss_and_metrics_are_those_of_transformers_and_by_hand(
    tiny_wav2vec2: str, spoken: str, tmp_path: Path
) -> None:
    """Sounds of differing lengths, whose padding is masked."""
    torch.manual_seed(1)
    module, rows = SpeechRecognition(tiny_wav2vec2, metrics=["cer", "wer"]), data(spoken, batch_size=5)
    (found,) = trainer(tmp_path).test(module, rows, verbose=False)
    model, tokenizer = module.model.eval(), rows.tokenizer
    batches: list[dict[str, torch.Tensor]] = list(rows.test_dataloader())
    assert [tuple(batch["labels"].shape) for batch in batches] == [(5, 6), (5, 6), (2, 5)]
    total = count = 0.0
    texts: list[str] = []
    for batch in batches:
        with torch.no_grad():
            output = model(**batch)
        total += output.loss.item()  # a sum, by transformers' default
        count += (batch["labels"] >= 0).sum().item()
        frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(dim=1))
        ids = [row[:length] for row, length in zip(output.logits.argmax(dim=-1), frames, strict=True)]
        # it writes unknown characters out, which no transcript has
        texts += [tokenizer.decode(row).replace("<unk>", "").strip() for row in ids]
    assert any(texts)
    words = [(text.split(), reference.split()) for text, reference in zip(texts, TEXTS, strict=True)]
    assert found == {
        "test_loss": pytest.approx(total / count, rel=1e-5),
        "test_wer": pytest.approx(sum(distance(*pair) for pair in words) / sum(len(b) for _, b in words)),
        "test_cer": pytest.approx(
            sum(distance(*pair) for pair in zip(texts, TEXTS, strict=True)) / sum(map(len, TEXTS))
        ),
    }


def test_rows_without_labels_and_those_too_long_add_nothing() -> None:
    model = torch.nn.Identity()
    module = SpeechRecognition(model, vocabulary=VOCABULARY)
    module.configure_model()
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[3, 4, -100, -100, -100], [-100] * 5, [3, 4, 3, 4, 5]])
    module.forward = lambda **_: logits  # type: ignore[method-assign]
    outcome = module.eval().outcome({"labels": labels})
    alone = torch.nn.functional.ctc_loss(
        logits[:1].log_softmax(-1).transpose(0, 1), labels[:1, :2], (4,), (2,), reduction="sum"
    )
    assert outcome.count == 7
    assert outcome.loss.item() == pytest.approx(alone.item() / 7)
    module.forward = lambda **_: logits[1:2]  # type: ignore[method-assign]
    metrics, none = {"wer": module.metrics["val"]["wer"]}, {"labels": labels[1:2]}
    outcome = module.outcome(none)
    module.update(metrics, none, outcome)
    assert (outcome.loss, metrics["wer"].total) == (0, 0)


def test_vocabulary_is_checked(tiny_wav2vec2: str, spoken: str, tmp_path: Path) -> None:
    with pytest.raises(PEFTError) as caught:
        SpeechRecognition(tiny_wav2vec2).configure_model()
    assert str(caught.value) == "vocabulary: give the tokens by id, or use a datamodule that has `vocabulary`"
    with pytest.raises(PEFTError) as caught:
        trainer(tmp_path).test(SpeechRecognition(tiny_wav2vec2, vocabulary=["<pad>", "x"]), data(spoken))
    assert str(caught.value) == (
        "vocabulary: the data's 7 tokens are not the model's 2; give the data the tokenizer or the training "
        "transcripts that the model had"
    )


@pytest.mark.parametrize(
    ("letters", "said", "text", "cer", "wer"),
    [
        # letters alone, as wav2vec2-base-960h has
        (string.ascii_lowercase, "hello, world. fine day!", "hello world fine day", 3 / 23, 3 / 4),
        ("helo", "héllo hello", "hllo hello", 1 / 11, 1 / 2),
    ],
)
def test_an_unknown_character_is_one_error(letters: str, said: str, text: str, cer: float, wer: float) -> None:
    """Beside edits counted by hand: all that can be heard is, and the others are put in."""
    tokenizer = character_tokenizer(letters)
    module = SpeechRecognition(torch.nn.Identity(), vocabulary=vocabulary_of(tokenizer))
    module.configure_model()
    labels, spoken = tokenizer([said])["input_ids"], tokenizer(text)["input_ids"]
    frames = torch.tensor([[token for number in spoken for token in (number, 0)]])
    outcome = Outcome(torch.tensor(0.0), torch.tensor(1), frames)
    metrics = {name: module.metrics["val"][name] for name in ("cer", "wer")}
    module.update(metrics, {"labels": torch.tensor(labels)}, outcome)
    assert {name: float(metric.compute()) for name, metric in metrics.items()} == pytest.approx(
        {"cer": cer, "wer": wer}
    )


@given(st.lists(st.integers(-1, 6), max_size=12))
def test_a_token_that_lasts_is_one_and_blanks_part_them(frames: list[int]) -> None:
    ids = [-100 if frame < 0 else frame for frame in frames]
    runs = [VOCABULARY[token] for token, _ in itertools.groupby(ids) if token >= 0]
    expected = "".join(token for token in runs if token not in ("<pad>", "<unk>")).replace("|", " ").strip()
    assert heard(VOCABULARY, ids) == expected
    tokenizer = character_tokenizer("abcd")
    kept = [token for token in ids if token >= 0]
    if -100 not in ids and 1 not in ids and "||" not in "".join(runs):
        assert tokenizer.decode(kept) == expected


def test_what_vocabularies_stand_for() -> None:
    assert blank_of(["a", "[PAD]"]) == 1
    assert blank_of(["_", "a"]) == 0
    assert spelled([" ", "|", "a"], [2, 0, 1]) == "a |"
    assert spelled(VOCABULARY, [3, 1, 2, 4]) == "a\ufffd b"
    parts = ["<pad>", "▁hello", "▁wor", "ld"]
    assert spelled(parts, [1, 2, 3]) == heard(parts, [1, 0, 2, 3, 3]) == "hello world"
    assert heard(["<s>", "[PAD]", "a", "|"], [0, 2, 2, 1, 2, 3, 3]) == "aa"
