"""A trained recognizer of words in gray pictures (CRNN: Shi et al., arXiv:1507.05717), as EasyOCR releases it.

Written from the paper and the keys of the released weights, which a package carries: see requirements-detector.txt.
"""

import re

import torch
from torch import Tensor, nn

from .craft import REQUIREMENTS
from .tasks.base import packaged

__all__ = ['Recognizer', 'read', 'recognizer']

# EasyOCR's order of the English characters; class 0 is the blank of CTC.
CHARACTERS = '0123456789!"#$%&\'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'
_WIDTH = 256  # of the sequence
_KEYS = {r'^module\.': '', r'^FeatureExtraction\.ConvNet\.': 'features.', r'^SequenceModeling\.': 'sequence.'}


class _Both(nn.Module):
    """An LSTM in both directions, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(_WIDTH, _WIDTH, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class Recognizer(nn.Module):
    """Logits (B, W / 4 - 1, 97) of characters in gray images (B, 1, 64, W).

    `share` is that of the channels in all but the last convolution, for tests.
    """

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for outputs, norm, pool in (
            (32, False, (2, 2)),
            (64, False, (2, 2)),
            (128, False, None),
            (128, False, (2, 1)),
            (256, True, None),
            (256, True, (2, 1)),
        ):
            width = int(share * outputs)
            layers += [nn.Conv2d(inputs, width, 3, padding=1)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
            layers += [nn.MaxPool2d(pool)] if pool else []
            inputs = width
        self.features = nn.Sequential(*layers, nn.Conv2d(inputs, _WIDTH, 2), nn.ReLU())
        self.sequence = nn.Sequential(_Both(), _Both())
        self.head = nn.Linear(_WIDTH, len(CHARACTERS) + 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.features(images))

    def logits(self, features: Tensor) -> Tensor:
        """What follows the convolutions."""
        return self.head(self.sequence(features.mean(2).transpose(1, 2)))


def recognizer() -> Recognizer:
    """The released network, in evaluation. Raises InputError if the package with its weights is missing."""
    path = packaged('easyocr_en_models', 'models/english_g2.pth', REQUIREMENTS)
    state = torch.load(path, weights_only=True, map_location='cpu')
    for old, new in (_KEYS | {r'^Prediction\.': 'head.'}).items():
        state = {re.sub(old, new, key): value for key, value in state.items()}
    model = Recognizer()
    biases = {key: torch.zeros_like(of) for key, of in model.state_dict().items() if key.endswith('bias')}
    model.load_state_dict(biases | state)  # those before batch normalisation are left out
    return model.eval()


def read(logits: Tensor) -> list[str]:
    """The word in each image, by the likeliest character at each place: repeated ones and blanks are left out."""
    return [
        ''.join(CHARACTERS[of - 1] for of in torch.unique_consecutive(best).tolist() if of) for best in logits.argmax(2)
    ]
