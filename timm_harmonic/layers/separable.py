"""The separable form of a harmonic layer: fixed filters for every input channel, then a 1 x 1 convolution.

    y = mix(respond(repeat(x)))

repeat() makes P copies of the C channels, in the order n * C + c: runtimes have no fast kernel for a depth-wise
convolution with several outputs a channel. respond() filters the copies by the P functions that the layer keeps, mix()
holds the coefficients. At each position that takes P k^2 C + P C O / groups multiply-adds; dense, k^2 C O / groups.
"""

import torch
from torch import Tensor, nn

from ..common import InputError

FORMS = ('dense', 'separable')


def check_form(form: str) -> str:
    """Returns the name of a form. Raises InputError for any other text."""
    if form not in FORMS:
        raise InputError(f'form must be one of {FORMS}, got {form!r}.')
    return form


class RepeatChannels(nn.Module):
    """Repeats the channels of images: (B, C, H, W) becomes (B, times * C, H, W), in the order n * C + c."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.times, x.dim() - 3)  # keeps the memory format; images may come without a batch

    def extra_repr(self) -> str:
        return f'times={self.times}'


def responding(basis: Tensor, channels: int, repeated: bool) -> Tensor:
    """Returns depth-wise filters (P * C, 1, k, k), in the order n * C + c if channels are repeated, else c * P + n."""
    filters = basis.repeat_interleave(channels, 0) if repeated else basis.repeat(channels, 1, 1)
    return filters.unsqueeze(1)


def mixing(coefficients: Tensor, repeated: bool) -> Tensor:
    """Returns coefficients (O, C / groups, P, 1) as the weight of a 1 x 1 convolution after `responding` filters."""
    if repeated:
        coefficients = coefficients.transpose(1, 2)
    return coefficients.flatten(1)[:, :, None, None]


def gather(x: Tensor, places: Tensor) -> Tensor:
    """Takes channels (..., C, H, W) by their places, some of them repeatedly, in the memory format of x."""
    if x.is_contiguous():
        return x.index_select(-3, places)
    return x.movedim(-3, -1).index_select(-1, places).movedim(-1, -3)


torch.fx.wrap('gather')


class Gather(nn.Module):
    """Takes channels, see `gather`."""

    places: Tensor

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.register_buffer('places', places.clone())

    def forward(self, x: Tensor) -> Tensor:
        return gather(x, self.places)
