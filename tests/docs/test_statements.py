"""Figures that pages state, against their sources."""

import json
from pathlib import Path

import pytest
import timm
import torch

from timm_harmonic import dct_basis
from timm_harmonic.layers.dct import dct_frequencies

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'benchmarks' / 'results'
README = (ROOT / 'README.md').read_text()


def rows_of(name):
    return json.loads((RESULTS / name).read_text())


@pytest.mark.parametrize('pattern', ['**/cpu.json', 'cuda.json'])
def test_time_of_fused_networks(pattern):
    """README.md: the range over networks, settings and batches in the tables of docs/layers.md."""
    ratios = [
        row['runs']['fused']['ratio']
        for path in RESULTS.glob(pattern)
        for row in rows_of(path.relative_to(RESULTS))['rows']
        if row['mode'] == 'eval' and not row['compiled'] and row['batch'] in (1, 8, 128)
        if 'cuda' in pattern or (row['precision'], row['channels_last']) == ('fp32', False)
    ]
    low, high = min(ratios), max(ratios)
    assert f'{low:.2f} to {high:.2f}' in ' '.join(README.split())


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_time_of_deployed_networks(name):
    """README.md: at level 1, in ONNX Runtime, for one image."""
    wanted = dict(model=name, setting='ONNX Runtime', batch=1)
    (row,) = (row for row in rows_of('deploy.json')['rows'] if wanted.items() <= row.items())
    assert f'took {row["runs"]["level 1"]["ratio"]:.2f}' in ' '.join(README.split())


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
