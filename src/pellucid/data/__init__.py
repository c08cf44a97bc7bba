"""Batches of pictures and of text: any folder, file or known name in, the same batches out on every run.

Knows nothing of models. The images pass one door (``images``), the randomness is a function of
(seed, epoch, index) (``randomness``), and a data set is looked at whole before it is used (``verify``).
"""

from pellucid.data.builtin import NAMES as BUILTIN_NAMES
from pellucid.data.checks import CheckReport, check
from pellucid.data.crops import Colour, Crops, MaskedView, Masking, MultiView
from pellucid.data.dataset import ArrayImages, FileImages, ImageData, ImageSet, Reject
from pellucid.data.documents import TextData, TextSet, load_text
from pellucid.data.images import ImageRejected, read_image, show_name, to_channels
from pellucid.data.load import load_data
from pellucid.data.loaders import Batch, StepSampler, ViewedSet, eval_loader, train_loader
from pellucid.data.packing import Packed, pack
from pellucid.data.randomness import draws, order
from pellucid.data.text_checks import TextReport
from pellucid.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    find_tokenizer,
    read_tokenizer,
    train_bpe,
)
from pellucid.data.views import Magnitudes, View
from pellucid.data.windows import IGNORED, Tokens, Windows, eval_token_loader, token_loader

__all__ = [
    "BUILTIN_NAMES",
    "IGNORED",
    "ArrayImages",
    "BPETokenizer",
    "Batch",
    "ByteTokenizer",
    "CheckReport",
    "Colour",
    "Crops",
    "FileImages",
    "ImageData",
    "ImageRejected",
    "ImageSet",
    "Magnitudes",
    "MaskedView",
    "Masking",
    "MultiView",
    "Packed",
    "Reject",
    "StepSampler",
    "TextData",
    "TextReport",
    "TextSet",
    "Tokenizer",
    "Tokens",
    "View",
    "ViewedSet",
    "Windows",
    "check",
    "draws",
    "eval_loader",
    "eval_token_loader",
    "find_tokenizer",
    "load_data",
    "load_text",
    "order",
    "pack",
    "read_image",
    "read_tokenizer",
    "show_name",
    "to_channels",
    "token_loader",
    "train_bpe",
    "train_loader",
]
