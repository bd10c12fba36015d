"""The separable form of a harmonic layer: fixed filters for every input channel, then a 1 x 1 convolution.

    y = mix(respond(x))

respond() filters each channel by the P functions that the layer keeps, mix() has the coefficients. It computes what the
dense form computes, one k x k convolution with composed filters. For C input and O output channels and each position it
takes P k^2 C + P C O / groups multiply-adds in place of k^2 C O / groups: fewer the lower the level. Where only the
constant function is kept, respond() is average pooling.
"""

from torch import Tensor

from ..common import InputError

FORMS = ('dense', 'separable')


def check_form(form: str) -> str:
    """The name of a form. Raises ValueError for another."""
    if form not in FORMS:
        raise InputError(f'form must be one of {FORMS}, got {form!r}.')
    return form


def pool_padding(side: int, padding: str | tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int] | None:
    """Padding of the average pooling that filters as a constant of this side does; None if no pooling does.

    Around the image are zeros. nn.AvgPool2d pads evenly, by half of its window at most, and has no dilation.
    """
    if dilation != (1, 1):
        return None
    if padding == 'valid':
        return (0, 0)
    if isinstance(padding, str):  # 'same'
        return None if side % 2 == 0 else (side // 2, side // 2)
    return padding if max(padding) <= side // 2 else None


def responding(basis: Tensor, channels: int) -> Tensor:
    """Depth-wise filters (C * P, 1, k, k) that give the responses in the order c * P + n."""
    return basis.repeat(channels, 1, 1).unsqueeze(1)


def mixing(coefficients: Tensor) -> Tensor:
    """Coefficients (O, C / groups, P, 1) as the weight (O, C / groups * P, 1, 1) of a 1 x 1 convolution."""
    return coefficients.flatten(1)[:, :, None, None]
