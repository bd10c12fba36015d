"""What the pages state about the code, computed anew."""

import pytest
import timm
import torch

from timm_harmonic import dct_basis
from timm_harmonic.export import folder
from timm_harmonic.layers.dct import dct_frequencies
from timm_harmonic.models import harm_resnet, weights


@pytest.mark.parametrize(('name', 'percent'), [('resnet50', 61), ('regnety_008', 91)])
def test_networks_that_cannot_become_small(name, percent):
    """docs/compression.md: the share of their parameters that they keep at the lowest level."""
    with torch.device('meta'):
        plain, low = timm.create_model(name), timm.create_model('harmonized', base_model=name, level=1)
    left = sum(p.numel() for p in low.parameters()) / sum(p.numel() for p in plain.parameters())
    assert round(100 * left) == percent


def test_functions_at_each_level():
    """docs/layers.md: of a 3 x 3 layer."""
    assert [len(dct_frequencies(3, level)) for level in range(1, 6)] == [1, 3, 6, 8, 9]


def test_how_much_slower_sgd_is_with_the_l1_basis():
    """docs/layers.md: a step on a coefficient moves the filter by the square of its function's norm, ortho's is 1."""
    factors = 1 / dct_basis(3, normalization='l1', dtype=torch.float64).square().sum((1, 2))
    assert factors.min().item() == pytest.approx(4)
    assert factors.max().item() == pytest.approx(9)


def test_names_in_the_release_checklist():
    """docs/weights.md: what a maintainer changes is there, under this name."""
    assert isinstance(weights.ORGANISATION, str)
    assert isinstance(harm_resnet._PINS, dict)
    assert isinstance(folder.INSTALL, str)
