"""A plain network for inference, with every harmonic layer in its faster form."""

from torch import Tensor, nn

from ..common import InputError
from ..layers import FORMS
from .costs import forms_by_rule, forms_by_time
from .running import trainable
from .swap import check_unwrapped, harmonic_layers, make_plain
from .timing import check_runtime


@trainable
def deploy(model: nn.Module, images: Tensor | None = None, *, form: str = 'auto', runtime: str = 'torch') -> nn.Module:
    """Makes a plain network for inference: nothing harmonic is left, and the graph computes no weight.

    A harmonic layer becomes one k x k convolution (dense), or a module that repeats the channels, one fixed filter for
    each of them, and a 1 x 1 convolution (separable), and computes the same. timm's blocks that fuse are fused as well.

    Args:
        model: Network. It does not change, except that its layers note their times.
        images: Example batch (B, C, H, W). With 'auto' every layer is timed in both forms on the inputs that it gets,
            and becomes separable where that is faster by more than the noise. Without images a rule decides: separable
            where that takes at most half of the multiply-adds, and the level is 1 or a group has 128 channels (64 in
            ONNX Runtime).
        form: 'auto', or 'dense' or 'separable' for all layers.
        runtime: Where the network will run: 'torch', on its device, in its dtype and memory format; or 'onnxruntime',
            on the CPU in float32, each layer in a session of its own. Threads are as many as torch's.

    Returns:
        A new network, in evaluation.

    Raises:
        InputError: If the form or the runtime is unknown, ONNX Runtime is not installed, images are empty or on another
            device, or a layer cannot be fused or has hooks.
        TypeError: If the model is not a network, or images are not a tensor.
    """
    check_unwrapped(model)
    if form not in ('auto', *FORMS):
        raise InputError(f"form must be 'auto' or one of {FORMS}, got {form!r}.")
    check_runtime(runtime)
    if form != 'auto':
        return make_plain(model, dict.fromkeys(harmonic_layers(model), form))
    found = forms_by_rule(model, runtime) if images is None else forms_by_time(model, images, runtime)
    return make_plain(model, found)
