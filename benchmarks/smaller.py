"""Smaller networks in other ways, to compare with: pruned channels, narrower networks, and 8-bit integers."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from timm_harmonic.common.onnx import write_onnx
from timm_harmonic.small_data.training import NAMED

CHANNELS = (32, 64, 128, 256)  # twice the quickstart's: in narrower layers there is no time to gain
_SHARES = [i / 40 for i in range(2, 41)]  # of the channels


def network(num_classes: int, share: float = 1.0, **options: Any) -> nn.Module:
    """The quickstart's network at twice its width, its stages this much narrower; plain without other options."""
    channels = tuple(max(1, round(c * share)) for c in CHANNELS)
    options = dict(NAMED['harm0'], **options) | dict(channels=channels)
    return timm.create_model('harm_resnet18', num_classes=num_classes, in_chans=1, **options)


def narrower(num_classes: int) -> list[nn.Module]:
    """Such networks from the narrowest to the whole, without training."""
    return [network(num_classes, share) for share in _SHARES]


def pruned(model: nn.Module, images: Tensor, grouped: bool) -> list[nn.Module]:
    """Copies of a plain network that lost channels, from few to all of them left, the same share in each layer.

    By Torch-Pruning (arXiv:2301.12900). Those with the smallest L2 norm go first: of their filters in the first of the
    layers that lose them, or grouped, of everything that goes with a channel.
    """
    import torch_pruning

    reduction = 'mean' if grouped else 'first'
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction=reduction)
    found = []
    for share in _SHARES:
        small = copy.deepcopy(model)
        options = dict(importance=importance, pruning_ratio=1 - share, ignored_layers=[small.get_classifier()])
        torch_pruning.pruner.BasePruner(small, example_inputs=images[:1], **options).step()
        found.append(small.eval())
    return found


def with_statistics(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Re-estimates the batch-norm statistics, as `refit` does for truncated networks."""
    update_bn(batches, model)
    return model.eval()


def in_int8(network: nn.Module, batches: Sequence[Tensor], folder: Path) -> Path:
    """The ONNX file of a plain network, weights and activations in 8 bits, with ranges from batches of images."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        left = iter(batches)

        def get_next(self) -> Any:
            return next((dict(images=images.contiguous().numpy()) for images in self.left), None)

    path, ready, quantised = (folder / name for name in ('fp32.onnx', 'ready.onnx', 'int8.onnx'))
    write_onnx(network, batches[0], path)
    quant_pre_process(str(path), str(ready))
    quantize_static(str(ready), str(quantised), Batches(), per_channel=True)
    return quantised
