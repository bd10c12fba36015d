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

from timm_harmonic import HarmonicConv2d, truncate

pytestmark = pytest.mark.usefixtures('one_thread')

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}
IMAGES = torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RATE = 0.01


def functions_of(layer):
    """The functions that a layer keeps, by their formula: (P, k, k)."""
    return reference.dct_functions(layer.kernel_size[0], layer.level, layer.dc, layer.normalization, layer.smoothness)


def mask_of(layer):
    """Which functions every input channel of a group keeps: (C / groups, P)."""
    whole = torch.ones(layer.in_channels // layer.groups, len(layer.basis), dtype=torch.bool)
    return whole if layer.kept is None else layer.kept[0, :, :, 0]


def projected(filters, layer):
    """The nearest filters that a layer can have."""
    functions = reference.dct_functions(layer.kernel_size[0], layer.level, layer.dc, 'ortho')
    return torch.einsum('oixy,nxy,nuv,in->oiuv', filters, functions, functions, mask_of(layer).double())


def by_definition(layer):
    """A layer's filters, function by function."""
    weight = layer.weight.detach().double().squeeze(-1)
    if layer.kept is not None:  # columns, function by function
        columns = iter(weight.unbind(1))
        nothing = torch.zeros_like(weight[:, 0, 0])
        of_function = [[next(columns)[:, 0] if kept else nothing for kept in of] for of in mask_of(layer).t()]
        weight = torch.stack([torch.stack(of, 1) for of in of_function], 2)
    return torch.einsum('oin,nxy->oixy', weight, functions_of(layer))


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
        new = HarmonicConv2d(4, 8, layer.kernel_size, **{**options, **changed})
        return new if layer.kept is None else new.at_pairs(mask_of(layer).flip(0))  # as many others

    @rule(dtype=st.sampled_from(list(TOLERANCE)), inference=st.booleans())
    def cast(self, dtype, inference):
        with torch.inference_mode(inference and not self.pruned):
            self.layer = self.layer.to(dtype)
        # Parameters that were made there cannot be trained: as in any network, they are copied out.
        for name, parameter in list(self.layer.named_parameters()):
            if parameter.is_inference():
                setattr(self.layer, name, nn.Parameter(parameter.clone()))
        self.follow()

    @rule()
    def train_and_evaluate(self):
        self.layer = self.layer.train(not self.layer.training)

    @rule()
    def to_channels_last(self):
        self.layer = self.layer.to(memory_format=torch.channels_last)

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
        if not self.pruned and self.layer.kernel_size != (1, 1) and self.layer.kept is None:
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
            before = other.weight.detach().clone()
            bases = [
                layer.normalization if layer.smoothness is None else layer.smoothness for layer in (self.layer, other)
            ]
            if bases[0] == bases[1]:
                other.load_state_dict(self.layer.state_dict())
                return
            with pytest.raises(RuntimeError, match='refer to the basis'):
                other.load_state_dict(self.layer.state_dict(), strict=False)
            assert torch.equal(other.weight, before)

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
        network = nn.Sequential(self.layer)
        problem = 'its weight is computed' if self.pruned else 'level'
        if self.pruned or level > 2 * self.layer.kernel_size[0] - 1:
            with pytest.raises(ValueError, match=problem):
                truncate(network, level=1 if self.pruned else level)
            return
        if level <= max(self.layer.levels().stop, 0):
            with pytest.raises(ValueError, match='leaves no pairs'):
                truncate(network, level=level)
            return
        lower = level < self.layer.level
        (self.layer,) = truncate(network, level=level)
        if lower:
            self.filters = projected(self.filters, self.layer)

    @rule(seed=st.integers(0, 100))
    def choose_pairs(self, seed):
        kept = torch.rand(mask_of(self.layer).shape, generator=torch.Generator().manual_seed(seed)) < 0.6
        if self.pruned or self.layer.groups > 1:
            with pytest.raises(ValueError, match='cannot choose pairs'):
                self.layer.at_pairs(kept)
        elif (kept & mask_of(self.layer)).any():
            self.layer = self.layer.at_pairs(kept)
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
        functions = functions_of(self.layer)
        mask = mask_of(self.layer).double()
        moved = torch.einsum('oixy,nxy,nuv,in->oiuv', gradient, functions, functions, mask)
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
                scale = max(1e-3, float(expected.abs().max()))  # cut and pruned, filters may be nothing but rounding
                assert float((y - expected).abs().max()) < TOLERANCE[dtype] * scale
            assert not self.layer.basis.is_inference()


def test_histories(search):
    search.machine(History)
