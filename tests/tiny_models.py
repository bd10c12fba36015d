"""A small harmonic network, registered as ours are, with weights for the stand-in Hub and its release page."""

import hashlib
import io

import reference
import timm
import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck

from timm_harmonic.models.harm_resnet import KEY_NAMES, HarmonicResNet, checkpoint_filter_fn
from timm_harmonic.models.weights import build_model, released_cfg

__all__ = ['CHECKPOINT', 'FILE', 'ID', 'KEY_NAMES', 'NAME']

_ARGS = dict(block=Bottleneck, layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))


def _released():
    """The content of the released file: the authors' wrapping and prefix."""
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(HarmonicResNet(**_ARGS))
    content = io.BytesIO()
    torch.save(dict(epoch=90, state_dict={f'module.{k}': v for k, v in model.state_dict().items()}), content)
    return content.getvalue()


NAME = 'tiny_harmonic'
ID = f'timm-harmonic/{NAME}.ulicny_in1k'
CHECKPOINT = _released()
FILE = f'{NAME}-{hashlib.sha256(CHECKPOINT).hexdigest()[:8]}.pth'

default_cfgs = generate_default_cfgs(
    {
        f'{NAME}.ulicny_in1k': released_cfg(
            f'{NAME}.ulicny_in1k', FILE, notes=('paper: nothing',), first_conv='conv1', classifier='fc'
        ),
        f'{NAME}.pinned': released_cfg(
            f'{NAME}.ulicny_in1k', 'other-00000000.pth', sha256='0' * 64, first_conv='conv1', classifier='fc'
        ),
    }
)


@register_model
def tiny_harmonic(pretrained=False, **kwargs):
    return build_model(
        HarmonicResNet,
        NAME,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3)),
        **dict(_ARGS, **kwargs),
    )


def create(name=NAME, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def images(channels=3, size=64):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def same(first, second, channels=3):
    with torch.inference_mode():
        return torch.equal(first(images(channels)), second(images(channels)))
