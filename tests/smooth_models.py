"""A network with a smoothness under a name of its own, for tests that create a model by its name alone."""

from timm.models import generate_default_cfgs, get_pretrained_cfg, register_model

from timm_harmonic.models.harm_resnet import checkpoint_filter_fn, harm_resnet18

__all__ = ['checkpoint_filter_fn', 'smooth_resnet18']

default_cfgs = generate_default_cfgs(
    {'smooth_resnet18': get_pretrained_cfg('harm_resnet18').to_dict(remove_source=True)}
)


@register_model
def smooth_resnet18(pretrained=False, **kwargs):
    return harm_resnet18(pretrained, **{'smoothness': 1, **kwargs})
