"""Small models with random weights in folders, and small data beside them, in place of what is on the hub."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = [
    "good",
    "bad",
    "the",
    "film",
    "was",
    "Ada",
    "lives",
    "in",
    "Rome",
    "where",
    "?",
    "user",
    "assistant",
    ":",
    "Tag",
]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def save_tokenizer(folder: str | Path) -> int:
    """A tokenizer of whole words, with a chat template; the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "cls_token": "<cls>",
        "sep_token": "<sep>",
        "eos_token": "<eos>",
    }
    vocabulary = {word: number for number, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, vocabulary[word]) for word in ("<cls>", "<sep>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=ends
    )
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **special)
    whole.chat_template = CHAT
    whole.save_pretrained(str(folder))
    return len(vocabulary)


def save_model(folder: Path, model_class: str, config_class: str, **sizes: Any) -> str:
    """A model of transformers with random weights, and the tokenizer, in `folder`."""
    import transformers

    vocabulary = save_tokenizer(folder)
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 4}
    config = getattr(transformers, config_class)(**{"vocab_size": vocabulary, **tokens, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, model_class)(config).save_pretrained(folder)
    return str(folder)


def save_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_images(folder: Path, per_class: int = 6) -> str:
    """Squares of two colours, in a folder each."""
    from PIL import Image

    for name, colour in {"blue": (0, 0, 255), "red": (255, 0, 0)}.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            Image.new("RGB", (12, 10), colour).save(folder / name / f"{number}.png")
    return str(folder)


def save_tones(folder: Path, per_class: int = 6, rate: int = 8000) -> str:
    """A quarter of a second of two pitches as WAV, in a folder each."""
    for name, pitch in {"high": 1200.0, "low": 200.0}.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            times = torch.arange(rate // 4) / rate
            samples = (torch.sin(6.2832 * (pitch + 10 * number) * times) * 20_000).to(torch.int16)
            with wave.open(str(folder / name / f"{number}.wav"), "wb") as file:
                file.setparams((1, 2, rate, 0, "NONE", ""))
                file.writeframes(samples.numpy().tobytes())
    return str(folder)


def distilbert(folder: Path) -> str:
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 512}
    return save_model(folder, "DistilBertModel", "DistilBertConfig", **sizes)


def roberta(folder: Path) -> str:
    return save_model(folder, "RobertaModel", "RobertaConfig", **SMALL, max_position_embeddings=514)


def llama(folder: Path) -> str:
    # no Qwen2: transformers would take its own tokenizer for it, which knows none of the words
    sizes = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 2048}
    return save_model(folder, "LlamaForCausalLM", "LlamaConfig", **sizes)


def t5(folder: Path) -> str:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return save_model(folder, "T5ForConditionalGeneration", "T5Config", **sizes)


def vit(folder: Path) -> str:
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return save_model(folder, "ViTModel", "ViTConfig", **SMALL, image_size=8, patch_size=4)


def wav2vec2(folder: Path) -> str:
    from transformers import Wav2Vec2FeatureExtractor

    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    sizes = {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 4), "classifier_proj_size": 8}
    position = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    return save_model(folder, "Wav2Vec2Model", "Wav2Vec2Config", **SMALL, **sizes, **position)


def wav2vec2_to_spell(folder: Path) -> str:
    """The same without a tokenizer, whose characters are then those of the transcripts."""
    wav2vec2(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return str(folder)


def save_spoken(folder: Path, texts: Sequence[str], rate: int = 8000) -> str:
    """Texts of the letters a to d and spaces as WAV, each character a tenth of a second of a pitch of its own, and a
    table of them."""
    folder.mkdir(parents=True)
    times = torch.arange(rate // 10) / rate
    for number, text in enumerate(texts):
        pitches = [400 * (1 + "abcd".find(letter)) for letter in text]
        samples = torch.cat([torch.sin(6.2832 * pitch * times) * 20_000 for pitch in pitches]).to(torch.int16)
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes(samples.numpy().tobytes())
    rows = [f"{number}.wav,{text}\n" for number, text in enumerate(texts)]
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(rows))
    return str(folder)


def segformer(folder: Path) -> str:
    from transformers import SegformerImageProcessorPil

    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    sizes = {"depths": [1] * 4, "hidden_sizes": [4, 8, 8, 8], "decoder_hidden_size": 8, "num_attention_heads": [1] * 4}
    return save_model(folder, "SegformerForSemanticSegmentation", "SegformerConfig", **sizes)


def yolos(folder: Path) -> str:
    from transformers import YolosImageProcessorPil

    YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    sizes = {**SMALL, "image_size": [32, 32], "patch_size": 16, "num_detection_tokens": 4}
    return save_model(folder, "YolosForObjectDetection", "YolosConfig", **sizes, use_mid_position_embeddings=False)


def save_squares(folder: Path, count: int = 12) -> str:
    """Red and blue squares on grey: images and masks, and a COCO file beside the images."""
    from PIL import Image, ImageDraw

    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    coco: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for number, (name, colour) in enumerate({"red": (255, 0, 0), "blue": (0, 0, 255)}.items()):
        coco["categories"].append({"id": number + 1, "name": name})
        for row in range(number, count, 2):
            image, mask = Image.new("RGB", (40, 30), (128, 128, 128)), Image.new("L", (40, 30))
            left, top = 2 * row % 20, row % 10
            ImageDraw.Draw(image).rectangle((left, top, left + 15, top + 15), colour)
            ImageDraw.Draw(mask).rectangle((left, top, left + 15, top + 15), number + 1)
            image.save(folder / "images" / f"{row}.png")
            mask.save(folder / "masks" / f"{row}.png")
            coco["images"].append({"id": row, "file_name": f"{row}.png"})
            box = {"image_id": row, "category_id": number + 1, "bbox": [left, top, 16, 16]}
            coco["annotations"].append(box)
    (folder / "classes.txt").write_text("ground\nred\nblue\n")
    (folder / "images" / "boxes.json").write_text(json.dumps(coco))
    return str(folder)


def reviews(folder: Path) -> str:
    return save_rows(folder / "a.jsonl", [{"text": f"the film was {w}", "label": w} for w in ("good", "bad")] * 10)


def names(folder: Path) -> str:
    row = {"tokens": ["Ada", "lives", "in", "Rome"], "tags": ["B-PER", "O", "O", "B-LOC"]}
    return save_rows(folder / "a.jsonl", [row] * 20)


def questions(folder: Path) -> str:
    answers = {"text": ["Rome"], "answer_start": [13]}
    row = {"question": "where lives Ada ?", "context": "Ada lives in Rome", "answers": answers}
    return save_rows(folder / "a.jsonl", [row] * 40)


def chats(folder: Path) -> str:
    turns = [{"role": "user", "content": "where lives Ada ?"}, {"role": "assistant", "content": "in Rome"}]
    return save_rows(folder / "a.jsonl", [{"messages": turns}] * 40)


def prompts(folder: Path) -> str:
    return save_rows(folder / "a.jsonl", [{"prompt": "where lives Ada ?", "response": "in Rome"}] * 40)


def pairs(folder: Path) -> str:
    return save_rows(folder / "a.jsonl", [{"source": "the good film", "target": "the bad film"}] * 40)


STAND_INS: dict[str, tuple[Callable[[Path], str], Callable[[Path], str]]] = {
    "text_classification": (distilbert, reviews),
    "token_classification": (roberta, names),
    "question_answering": (distilbert, questions),
    "instruct": (llama, chats),
    "qlora_instruct": (llama, chats),
    "qlora_offline": (llama, prompts),
    "translation": (t5, pairs),
    "image_classification": (vit, lambda folder: save_images(folder / "images")),
    "image_segmentation": (segformer, lambda folder: save_squares(folder / "squares")),
    "object_detection": (yolos, lambda folder: save_squares(folder / "squares") + "/images"),
    "speech_classification": (wav2vec2, lambda folder: save_tones(folder / "tones")),
    "speech_recognition": (wav2vec2_to_spell, lambda folder: save_spoken(folder / "spoken", ["ab cad", "dab"] * 6)),
}
"""For each of configs/, what makes its model and its data in a folder."""
