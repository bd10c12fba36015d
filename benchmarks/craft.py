"""CRAFT, a trained text detector (Baek et al., CVPR 2019, arXiv:1904.01941), and the words in its score maps.

Written from the paper and the keys of the released weights, which a package carries: see requirements-detector.txt.
"""

import re
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage, optimize
from torch import Tensor, nn

from .tasks.base import packaged

__all__ = ['MEAN', 'STD', 'Craft', 'craft', 'f1', 'words']

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
REQUIREMENTS = Path(__file__).with_name('requirements-detector.txt')
_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512))  # of the trunk: VGG-16 up to conv5_2
_TAPS = (12, 19, 29, 38)  # modules of the trunk whose outputs the decoder takes
_KEYS = {
    r'^module\.': '',
    r'^basenet\.slice[1-4]\.': 'trunk.',
    r'^basenet\.slice5\.': 'context.',
    r'^upconv(\d)\.conv\.': lambda match: f'decoder.{int(match[1]) - 1}.',
    r'^conv_cls\.': 'head.',
}
TEXT, LINK, LOW_TEXT = 0.7, 0.4, 0.4  # the usual thresholds of scores
MARGIN = 0.2  # of the height of a word, chosen on the calibration pages
OVERLAP = 0.5  # of the union of two boxes, from which on they are the same word
_LEAST = 10  # pixels of a word in the maps
_CORNERS = ((np.maximum, slice(0, 2)), (np.minimum, slice(2, 4)))


def _up(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    """The paper's UpConv block, without the upsampling."""
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 1),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Craft(nn.Module):
    """Maps of the region and affinity scores (B, 2, H / 2, W / 2) of images (B, 3, H, W), sides multiples of 16.

    Args:
        share: Of the channels that the released network has.
    """

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()

        def width(channels: int) -> int:
            return max(1, round(share * channels))

        layers: list[nn.Module] = []
        inputs = 3
        for block in _WIDTHS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for outputs in map(width, block):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
        self.trunk = nn.Sequential(*layers[:-1])  # the released network has no ReLU behind the last one
        wide = width(1024)
        self.context = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(inputs, wide, 3, padding=6, dilation=6), nn.Conv2d(wide, wide, 1)
        )
        self.decoder = nn.ModuleList()
        for tapped, middle, outputs in ((512, 512, 256), (512, 256, 128), (256, 128, 64), (128, 64, 32)):
            self.decoder.append(_up(wide + width(tapped), width(middle), width(outputs)))
            wide = width(outputs)
        self.upsample = nn.Upsample(scale_factor=2, mode='bilinear')
        head: list[nn.Module] = []
        for outputs, kernel in ((32, 3), (32, 3), (16, 3), (16, 1)):
            head += [nn.Conv2d(wide, width(outputs), kernel, padding=kernel // 2), nn.ReLU()]
            wide = width(outputs)
        self.head = nn.Sequential(*head, nn.Conv2d(wide, 2, 1))

    def forward(self, images: Tensor) -> Tensor:
        x, taps = images, []
        for i, module in enumerate(self.trunk):
            x = module(x)
            if i in _TAPS:
                taps.append(x)
        x = self.context(x)
        for i, (block, tap) in enumerate(zip(self.decoder, reversed(taps), strict=True)):
            x = block(torch.cat([self.upsample(x) if i else x, tap], 1))
        return self.head(x)


def craft() -> Craft:
    """The released network, in evaluation. Raises InputError if the package with its weights is missing."""
    path = packaged('easyocr_en_models', 'models/craft_mlt_25k.pth', REQUIREMENTS)
    state = torch.load(path, weights_only=True, map_location='cpu')
    for old, new in _KEYS.items():
        state = {re.sub(old, new, key): value for key, value in state.items()}
    model = Craft()
    model.load_state_dict(state)
    return model.eval()


def words(maps: Tensor) -> np.ndarray:
    """Boxes (N, 4) of the words in the maps (2, H, W) of an image, in its pixels: left, top, right, bottom.

    As in section 3.3 of the paper, for horizontal text: connected pixels of either score are a word. Its box holds the
    region scores, and grows by a share of its height, because these fall off before a character ends.
    """
    region, affinity = maps.numpy()
    labels, count = ndimage.label((region > LOW_TEXT) | (affinity > LINK))
    highest = ndimage.maximum(region, labels, range(1, count + 1))
    inside = np.where(region > LOW_TEXT, labels, 0)
    sizes = np.bincount(inside.ravel(), minlength=count + 1)[1:]
    boxes = []
    for place, (rows, columns) in ((i, of) for i, of in enumerate(ndimage.find_objects(inside, count)) if of):
        if highest[place] >= TEXT and sizes[place] >= _LEAST:
            margin = MARGIN * (rows.stop - rows.start)
            boxes.append((columns.start - margin, rows.start - margin, columns.stop + margin, rows.stop + margin))
    scale = 2 * np.array(boxes).reshape(-1, 4)
    return scale.clip(0, np.tile(region.shape[::-1], 2) * 2)


def f1(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """F1 score of the boxes (N, 4) found in each image, in percent: pairs overlap by half of their union."""
    pairs = 0
    for ours, theirs in zip(found, wanted, strict=True):
        low, high = (pick(ours[:, None, of], theirs[None, :, of]) for pick, of in _CORNERS)
        shared = (high - low).clip(0).prod(2)
        areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (ours, theirs)]
        overlap = shared / (areas[0][:, None] + areas[1] - shared)
        chosen = optimize.linear_sum_assignment(overlap >= OVERLAP, maximize=True)
        pairs += int((overlap[chosen] >= OVERLAP).sum())
    return 200 * pairs / max(1, sum(map(len, [*found, *wanted])))
