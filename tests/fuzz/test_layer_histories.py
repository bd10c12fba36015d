"""A layer that is cast, copied, loaded, trained, cut and pruned in any order, beside a plain convolution."""

import copy
import io
import pickle

import pytest
import reference
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn
from torch.nn.utils import prune

from timm_harmonic import HarmonicConv2d

pytestmark = pytest.mark.usefixtures('one_thread')

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}
IMAGES = torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RATE = 0.01


def unit_functions(layer):
    """The functions that a layer keeps, each of norm 1, by their formula: (P, k, k)."""
    return reference.dct_functions(layer.kernel_size[0], layer.level, layer.dc, 'ortho')


def projected(filters, layer):
    """The nearest filters that a layer can have."""
    functions = unit_functions(layer)
    return torch.einsum('oixy,nxy,nuv->oiuv', filters, functions, functions)


def by_definition(layer):
    """A layer's filters, function by function."""
    functions = reference.dct_functions(
        layer.kernel_size[0], layer.level, layer.dc, layer.normalization, layer.smoothness
    )
    return torch.einsum('oin,nxy->oixy', layer.weight.detach().double().squeeze(-1), functions)


class History(RuleBasedStateMachine):
    """`layer` is what is tested, `filters` and `bias` are those of the plain convolution, in float64."""

    @initialize(
        k=st.sampled_from([1, 2, 3, 5]),
        groups=st.sampled_from([1, 2, 4]),
        bias=st.booleans(),
        normalization=st.sampled_from(['l1', 'ortho']),
        smoothness=st.sampled_from([None, 0, 0.5, 2]),
        form=st.sampled_from(['dense', 'separable']),
        padding_mode=st.sampled_from(['zeros', 'reflect', 'circular']),
        level=st.none() | st.integers(1, 3),
    )
    def begin(self, k, level, **options):
        torch.manual_seed(0)
        level = level and min(level, 2 * k - 1)
        self.layer = HarmonicConv2d(4, 8, k, padding=k // 2, level=level, dtype=torch.float64, **options)
        if self.layer.bias is not None:
            nn.init.normal_(self.layer.bias)
        self.follow()

    def follow(self):
        """The plain convolution takes over what the layer has, after a change that rounds or chance decides."""
        if self.pruned:
            self.layer(IMAGES.to(self.dtype))  # which computes the weight, as in any pruned layer
        self.filters = by_definition(self.layer)
        self.bias = None if self.layer.bias is None else self.layer.bias.detach().double().clone()

    @property
    def pruned(self):
        return 'weight' not in dict(self.layer.named_parameters())

    @property
    def dtype(self):
        return next(self.layer.parameters()).dtype

    def new(self, **changed):
        """An untrained layer of the same kind."""
        layer = self.layer
        options = dict(
            padding=layer.padding,
            groups=layer.groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
            level=layer.level,
            normalization=layer.normalization,
            smoothness=layer.smoothness,
            form=layer.form,
            dtype=self.dtype,
        )
        return HarmonicConv2d(4, 8, layer.kernel_size, **{**options, **changed})

    @rule(dtype=st.sampled_from(list(TOLERANCE)), by=st.sampled_from(['to', 'inference', 'named']))
    def cast(self, dtype, by):
        if by == 'inference' and not self.pruned:
            with torch.inference_mode():
                self.layer = self.layer.to(dtype)
            # Parameters that were made there cannot be trained: as in any network, they are copied out.
            for name, parameter in list(self.layer.named_parameters()):
                setattr(self.layer, name, nn.Parameter(parameter.clone()))
        elif by == 'named':
            self.layer = {torch.float64: nn.Module.double, torch.float32: nn.Module.float}.get(
                dtype, nn.Module.bfloat16
            )(self.layer)
        else:
            self.layer = self.layer.to(dtype)
        self.follow()

    @rule()
    def train_and_evaluate(self):
        self.layer = self.layer.train(not self.layer.training)

    @rule()
    def to_channels_last(self):
        self.layer = self.layer.to(memory_format=torch.channels_last)

    @rule()
    def share_memory(self):
        self.layer.share_memory()

    @rule()
    def move_through_meta(self):
        """As tools do that build networks without memory."""
        if not self.pruned:
            state = self.layer.state_dict()
            self.layer = self.layer.to('meta').to_empty(device='cpu')
            self.layer.load_state_dict(state)

    @rule(how=st.sampled_from(['deepcopy', 'pickle', 'save']))
    def duplicate(self, how):
        if how == 'deepcopy':
            self.layer = copy.deepcopy(self.layer)
        elif how == 'pickle':
            self.layer = pickle.loads(pickle.dumps(self.layer))
        else:
            file = io.BytesIO()
            torch.save(self.layer, file)
            self.layer = torch.load(io.BytesIO(file.getvalue()), weights_only=False)

    @rule(assign=st.booleans(), strict=st.booleans())
    def load_into_another(self, assign, strict):
        if not self.pruned:
            other = self.new()
            other.load_state_dict(copy.deepcopy(self.layer.state_dict()), assign=assign, strict=strict)
            self.layer = other

    @rule(seed=st.integers(0, 100), assign=st.booleans())
    def load_plain_filters(self, seed, assign):
        if not self.pruned and self.layer.kernel_size != (1, 1):
            filters = torch.randn(
                self.filters.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            ).to(self.dtype)
            state = {**self.layer.state_dict(), 'weight': filters}
            self.layer.load_state_dict(state, assign=assign)
            self.filters = projected(filters.double(), self.layer)
            if self.dtype is torch.bfloat16:
                self.follow()

    @rule(normalization=st.sampled_from(['l1', 'ortho']), smoothness=st.sampled_from([None, 0, 1]))
    def other_bases_are_refused(self, normalization, smoothness):
        if not self.pruned:
            other = self.new(normalization=normalization, smoothness=smoothness)
            before = copy.deepcopy(other.state_dict())
            if other.named_basis() != self.layer.named_basis():
                with pytest.raises(RuntimeError, match='refer to the basis'):
                    other.load_state_dict(self.layer.state_dict(), strict=False)
                assert torch.equal(other.weight, before['weight'])
            else:
                other.load_state_dict(self.layer.state_dict())

    @rule(normalization=st.sampled_from(['l1', 'ortho']), smoothness=st.sampled_from([None, 0, 1, 3]))
    def convert(self, normalization, smoothness):
        """To plain and back, to another basis perhaps."""
        dense = copy.deepcopy(self.layer)
        dense.form = 'dense'
        options = dict(level=self.layer.level, normalization=normalization, smoothness=smoothness)
        self.layer = HarmonicConv2d.from_conv2d(dense.fuse(), form=self.layer.form, **options)
        if self.dtype is torch.bfloat16:
            self.follow()

    @rule(level=st.integers(1, 9))
    def cut(self, level):
        if self.pruned:
            with pytest.raises(ValueError, match='its weight is computed'):
                self.layer.at_level(1)
            return
        full = 2 * self.layer.kernel_size[0] - 1
        if level > full:
            with pytest.raises(ValueError, match='level'):
                self.layer.at_level(level)
            return
        lower = level < self.layer.level
        self.layer = self.layer.at_level(level)
        if lower:
            self.filters = projected(self.filters, self.layer)

    @rule()
    def change_form(self):
        self.layer.form = 'separable' if self.layer.form == 'dense' else 'dense'

    @rule(amount=st.sampled_from([0.1, 0.5]))
    def prune(self, amount):
        if not self.pruned:
            self.layer.to(memory_format=torch.contiguous_format)  # torch prunes no others
            prune.random_unstructured(self.layer, 'weight', amount)
            self.follow()

    @rule()
    def make_pruning_permanent(self):
        if self.pruned:
            prune.remove(self.layer, 'weight')

    @rule()
    def step(self):
        """SGD on the coefficients moves the filters by the gradient's part of each function, times its energy."""
        if self.pruned or self.dtype is torch.bfloat16:
            return
        target = torch.randn(self.plain(IMAGES).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        self.layer.requires_grad_(True).zero_grad()
        (self.layer(IMAGES.to(self.dtype)) * target.to(self.dtype)).sum().backward()
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter -= RATE * parameter.grad
        self.filters.requires_grad_(True)
        gradient = torch.autograd.grad((self.plain(IMAGES) * target).sum(), self.filters)[0]
        functions = reference.dct_functions(
            self.layer.kernel_size[0],
            self.layer.level,
            self.layer.dc,
            self.layer.normalization,
            self.layer.smoothness,
        )
        moved = torch.einsum('oixy,nxy,nuv->oiuv', gradient, functions, functions)
        self.filters = (self.filters - RATE * moved).detach()
        if self.bias is not None:
            self.bias = self.bias - RATE * target.sum((0, 2, 3))

    def plain(self, x):
        layer = self.layer
        if layer.padding_mode != 'zeros':
            side = layer.padding[0]
            x = nn.functional.pad(x, (side,) * 4, mode=layer.padding_mode)
            return nn.functional.conv2d(x, self.filters, self.bias, groups=layer.groups)
        return nn.functional.conv2d(x, self.filters, self.bias, padding=layer.padding, groups=layer.groups)

    @invariant()
    def both_compute_the_same(self):
        if not hasattr(self, 'layer'):
            return
        dtype = self.dtype
        x = IMAGES.to(dtype)
        with torch.no_grad():
            expected = self.plain(x.double())
            for layer in (self.layer, self.layer.fuse()):
                y = layer(x)
                assert y.dtype is dtype
                assert reference.relative_error(y, expected) < TOLERANCE[dtype]
            assert not self.layer.basis.is_inference()


def test_histories(search):
    search.machine(History)
