"""Networks with a smoothness under names of their own, for tests that create a model by its name alone."""

from timm.models import generate_default_cfgs, get_pretrained_cfg

from timm_harmonic.models import harm_resnet, harm_vgg, harm_wrn
from timm_harmonic.models.options import register

# Registered name, the file of the model, its name there, and its options. A VGG's whole classifier takes a minute.
MODELS = {
    'smooth_resnet18': (harm_resnet, 'harm_resnet18', dict(smoothness=1)),
    'smooth_seresnext50_32x4d': (harm_resnet, 'harm_seresnext50_32x4d', dict(smoothness=0.5)),
    'smooth_vgg11_bn': (harm_vgg, 'harm_vgg11_bn', dict(smoothness=2, mlp_ratio=0.02)),
    'smooth_wrn16_8': (harm_wrn, 'harm_wrn16_8', dict(smoothness=1)),
}
__all__ = ['checkpoint_filter_fn']

default_cfgs = generate_default_cfgs(
    {name: get_pretrained_cfg(base).to_dict(remove_source=True) for name, (_, base, _) in MODELS.items()}
)


def checkpoint_filter_fn(checkpoint, model):
    """That of the model's own file."""
    module = next(module for module, *_ in MODELS.values() if module.__name__ == type(model).__module__)
    return module.checkpoint_filter_fn(checkpoint, model)


def _create(variant, pretrained=False, **kwargs):
    module, base, options = MODELS[variant]
    return module._create(base, pretrained, **{**options, **kwargs})


for name in MODELS:
    globals()[name] = register(_create, name, 'A network with smoothness, for tests.')
