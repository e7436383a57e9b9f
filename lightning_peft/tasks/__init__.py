"""Ordinary LightningModules that train a given model on a given kind of data; they know nothing of adapters."""

from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.image_classification import ImageClassification
from lightning_peft.tasks.object_detection import ObjectDetection
from lightning_peft.tasks.question_answering import QuestionAnswering
from lightning_peft.tasks.semantic_segmentation import SemanticSegmentation
from lightning_peft.tasks.seq2seq import Seq2Seq
from lightning_peft.tasks.sequence_classification import SequenceClassification
from lightning_peft.tasks.speech_classification import SpeechClassification
from lightning_peft.tasks.speech_recognition import SpeechRecognition
from lightning_peft.tasks.token_classification import TokenClassification

__all__ = [
    "CausalLM",
    "ImageClassification",
    "ObjectDetection",
    "QuestionAnswering",
    "SemanticSegmentation",
    "Seq2Seq",
    "SequenceClassification",
    "SpeechClassification",
    "SpeechRecognition",
    "TokenClassification",
]
