"""How images are prepared for a network, as its config or its training run says."""

from typing import Any

from timm.data import resolve_data_config
from torch import nn

from ..common import InputError

MODES = {1: 'L', 3: 'RGB'}  # Pillow's, by channels: what timm's transforms take


def data_config(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """timm's config of a network's images, for as many channels as it takes.

    `given` has options by timm's names, as of a training run. A mean and deviation of other channels in the network's
    config become their averages. Raises ValueError if given ones have other channels.
    """
    for key in ('mean', 'std'):
        if given.get(key) is not None and len(given[key]) not in (1, model.in_chans):
            raise InputError(
                f'{key} has {len(given[key])} values, the network takes {model.in_chans} channels: give one value, or '
                'one for each channel.'
            )
    config = resolve_data_config(dict(given, in_chans=model.in_chans), model=model)
    config['input_size'] = (model.in_chans, *config['input_size'][1:])
    for key in ('mean', 'std'):
        if len(config[key]) != model.in_chans:
            config[key] = (sum(config[key]) / len(config[key]),) * model.in_chans
    return config
