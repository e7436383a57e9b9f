"""Ordinary LightningDataModules: they read, check and batch data, and know nothing of adapters."""

from lightning_peft.data.audio_folder import AudioFolderData
from lightning_peft.data.detection import DetectionData
from lightning_peft.data.docstrings import DocstringData
from lightning_peft.data.image_folder import ImageFolderData
from lightning_peft.data.instructions import InstructionData
from lightning_peft.data.language_modeling import LanguageModelingData
from lightning_peft.data.question_answering import QuestionAnsweringData
from lightning_peft.data.segmentation_folder import SegmentationFolderData
from lightning_peft.data.speech_recognition import SpeechRecognitionData
from lightning_peft.data.text_classification import TextClassificationData
from lightning_peft.data.token_classification import TokenClassificationData
from lightning_peft.data.translation import TranslationData

__all__ = [
    "AudioFolderData",
    "DetectionData",
    "DocstringData",
    "ImageFolderData",
    "InstructionData",
    "LanguageModelingData",
    "QuestionAnsweringData",
    "SegmentationFolderData",
    "SpeechRecognitionData",
    "TextClassificationData",
    "TokenClassificationData",
    "TranslationData",
]
