"""A small harmonic network, registered as ours are: one tag from the release page, one pinned on the Hub."""

import hashlib
import io

import reference
import safetensors.torch
import timm
import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck

from timm_harmonic.models.harm_resnet import KEY_NAMES, HarmonicResNet, checkpoint_filter_fn
from timm_harmonic.models.weights import build_model, released_cfg

__all__ = ['CHECKPOINT', 'FILE', 'ID', 'KEY_NAMES', 'NAME', 'PINNED', 'WEIGHTS']

_ARGS = dict(block=Bottleneck, layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))


def _contents():
    """The released file, in the authors' wrapping and with their prefix, and the same weights as on the Hub."""
    torch.manual_seed(0)
    state = reference.randomize_batch_norm(HarmonicResNet(**_ARGS)).state_dict()
    content = io.BytesIO()
    torch.save(dict(epoch=90, state_dict={f'module.{key}': value for key, value in state.items()}), content)
    return content.getvalue(), safetensors.torch.save(state)


NAME = 'tiny_harmonic'
PINNED = f'{NAME}.pinned'
ID = f'timm-harmonic/{PINNED}'
CHECKPOINT, WEIGHTS = _contents()
FILE = f'{NAME}-{hashlib.sha256(CHECKPOINT).hexdigest()[:8]}.pth'

_LAYERS = dict(first_conv='conv1', classifier='fc')
default_cfgs = generate_default_cfgs(
    {
        f'{NAME}.ulicny_in1k': released_cfg(f'{NAME}.ulicny_in1k', FILE, notes=('paper: nothing',), **_LAYERS),
        PINNED: released_cfg(PINNED, FILE, hashlib.sha256(WEIGHTS).hexdigest(), ('paper: nothing',), **_LAYERS),
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
