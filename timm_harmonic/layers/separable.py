"""The separable form of a harmonic layer: fixed filters for every input channel, then a 1 x 1 convolution.

    y = mix(respond(x))

respond() filters each channel by the P functions that the layer keeps, mix() holds the coefficients. The dense form
computes the same by one k x k convolution with composed filters. For C input and O output channels the separable form
takes P k^2 C + P C O / groups multiply-adds at each position, the dense one k^2 C O / groups: the lower the level, the
more it saves. If the layer keeps only a constant function, respond() is average pooling.
"""

from torch import Tensor

from ..common import InputError

FORMS = ('dense', 'separable')


def check_form(form: str) -> str:
    """Returns the name of a form. Raises InputError for any other text."""
    if form not in FORMS:
        raise InputError(f'form must be one of {FORMS}, got {form!r}.')
    return form


def pool_padding(side: int, padding: str | tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int] | None:
    """Returns the padding of the average pooling that equals a constant filter of this side, or None if none does.

    Zeros surround the image. nn.AvgPool2d pads evenly, by at most half of its window, and has no dilation.
    """
    if dilation != (1, 1):
        return None
    if padding == 'valid':
        return (0, 0)
    if isinstance(padding, str):  # 'same'
        return None if side % 2 == 0 else (side // 2, side // 2)
    return padding if max(padding) <= side // 2 else None


def responding(basis: Tensor, channels: int) -> Tensor:
    """Returns depth-wise filters (C * P, 1, k, k) whose responses come in the order c * P + n."""
    return basis.repeat(channels, 1, 1).unsqueeze(1)


def mixing(coefficients: Tensor) -> Tensor:
    """Returns coefficients (O, C / groups, P, 1) as the weight (O, C / groups * P, 1, 1) of a 1 x 1 convolution."""
    return coefficients.flatten(1)[:, :, None, None]
