"""The networks that are compared: any of timm with options, and the small ones that have names here."""

import ast
import dataclasses
from typing import Any

import timm
import torch
from timm.utils import random_seed
from torch import nn

from ..models.checkpoints import first_line

# A ResNet for a few hundred images of 32 to 96 pixels, of 0.3 million parameters.
_SMALL: dict[str, Any] = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), stem_pool='max')
NAMED: dict[str, dict[str, Any]] = {
    'harm0': dict(_SMALL, harmonic_stem=False, harmonic_blocks=False),
    'harm1': dict(_SMALL, harmonic_blocks=False),
    'harm': _SMALL,
    'smooth': dict(_SMALL, smoothness=1),
}
MEANINGS = dict(
    harm0='nothing harmonic', harm1='stem harmonic', harm='all harmonic', smooth='all harmonic, smoothness 1'
)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network by the name that the user gave it."""

    name: str
    model: str  # timm's name
    options: dict[str, Any]

    def build(self, num_classes: int, in_chans: int, seed: int) -> nn.Module:
        """A new network. Its initial weights follow from the seed."""
        random_seed(seed)
        return timm.create_model(self.model, num_classes=num_classes, in_chans=in_chans, **self.options)

    def check(self, num_classes: int, in_chans: int, size: int) -> None:
        """Raises ValueError if the network cannot be built, or cannot run on images of this size."""
        try:
            model = self.build(num_classes, in_chans, 0).eval()
            with torch.no_grad():
                output = model(torch.zeros(1, in_chans, size, size))
            if getattr(output, 'shape', None) != (1, num_classes):
                raise TypeError('it gives no logits of the classes')
        except Exception as error:  # any network of timm, with any options
            problem = f'{type(error).__name__}: {first_line(error)}'
            raise ValueError(f'{self.name} cannot be used on images of {size} x {size} pixels: {problem}') from error


def network(text: str) -> Network:
    """The network of a name: one of NAMED or timm's, with options as `harm_resnet18:smoothness=1,levels=3`.

    Raises ValueError if timm has no such model, or an option is no NAME=VALUE.
    """
    model, _, options = text.partition(':')
    given = dict(map(option, _split(options))) if options else {}
    if model in NAMED:
        return Network(text, 'harm_resnet18', {**NAMED[model], **given})
    if not timm.is_model(model):
        raise ValueError(f'{model!r} is neither one of {", ".join(NAMED)} nor a model of timm.')
    return Network(text, model, given)


def _split(options: str) -> list[str]:
    """Options between the commas that are not in brackets."""
    parts, depth = [''], 0
    for letter in options:
        depth += (letter in '([{') - (letter in ')]}')
        if letter == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += letter
    return parts


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE as name and value, a literal of Python or a text. Raises ValueError if it is something else."""
    key, equals, value = text.strip().partition('=')
    if not key.isidentifier() or not equals:
        raise ValueError(f'must be NAME=VALUE, got {text!r}')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
