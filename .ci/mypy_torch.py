"""A plugin for mypy: what torch.nn.Module does not declare can be of any type.

torch declares such an attribute as `Tensor | Module`. timm's networks hold configs, names and lists there.
"""

from mypy.plugin import Plugin
from mypy.types import AnyType, TypeOfAny, UnionType


class _AnyAttribute(Plugin):
    def get_attribute_hook(self, fullname):
        if fullname.startswith('torch.nn.modules.module.Module.'):
            return lambda context: (
                AnyType(TypeOfAny.special_form)
                if isinstance(context.default_attr_type, UnionType)
                else context.default_attr_type
            )
        return None


def plugin(version):
    return _AnyAttribute
