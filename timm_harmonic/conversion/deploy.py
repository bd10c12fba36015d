"""A plain network for inference: every harmonic layer in the form that is faster."""

import copy

from timm.models import reparameterize_model
from torch import Tensor, nn

from ..common import InputError
from ..layers import FORMS, HarmonicLayer
from .forms import forms_by_names, forms_by_rule, forms_by_time, set_forms
from .running import trainable
from .swap import changes_of, check_unwrapped, harmonic_layers, in_fusing_blocks, replace_layers


@trainable
def deploy(model: nn.Module, images: Tensor | None = None, *, form: str = 'auto') -> nn.Module:
    """Makes a plain network for inference: nothing harmonic is left, and no weight is computed in the graph.

    A harmonic layer becomes one k x k convolution (dense), or fixed filters for every channel and a 1 x 1 convolution
    (separable): average pooling and a 1 x 1 convolution at level 1. Both compute the same, up to rounding. Blocks of
    timm that fuse for inference are fused as well, as by timm's `reparameterize_model`.

    Args:
        model: Network. It stays as it is, but for the times that are noted in its layers.
        images: Example batch (B, C, H, W). With 'auto' every layer is timed in both forms on its device, in its dtype,
            memory format and batch, and becomes separable where that is faster by more than the noise. Without images
            a rule decides: separable where that takes at most half of the multiply-adds, and the level is 1 or a group
            has 64 channels.
        form: 'auto', or 'dense' or 'separable' for all layers.

    Returns:
        A new network, in evaluation.

    Raises:
        ValueError: If form is another word, images are empty or on another device, or a layer cannot be fused or has
            hooks.
        TypeError: If the model is no network, or images are no tensor.
    """
    check_unwrapped(model)
    if form not in ('auto', *FORMS):
        raise InputError(f"form must be 'auto' or one of {FORMS}, got {form!r}.")
    if form != 'auto':
        forms = forms_by_names(list(harmonic_layers(model)), form)
    else:
        forms = forms_by_rule(model) if images is None else forms_by_time(model, images)
    plain = copy.deepcopy(model).eval()
    set_forms(plain, forms)
    for name, layer in harmonic_layers(plain).items():
        if reason := changes_of(layer):
            raise InputError(f'cannot deploy {name or type(layer).__name__}: {reason}. Remove that first.')
    if isinstance(plain, HarmonicLayer):
        return plain.fuse()
    # Not left to timm's function alone: it does not see a layer that one module has under two names.
    within = in_fusing_blocks(plain)
    replace_layers(plain, {name: layer.fuse() for name, layer in harmonic_layers(plain).items() if name not in within})
    return reparameterize_model(plain, inplace=True)
