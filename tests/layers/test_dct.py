"""The DCT basis by its mathematical properties."""

import itertools

import numpy as np
import pytest
import reference
import scipy.fft
import torch

from timm_harmonic import dct_basis
from timm_harmonic.layers.compose import compose
from timm_harmonic.layers.dct import NORMALIZATIONS, dct_frequencies, project

SIZES = [1, 2, 3, 4, 7]


@pytest.mark.parametrize('k', SIZES)
def test_basis_is_scipys_dct(k):
    """The orthonormal basis is the type-II DCT: coefficients of a random patch are scipy's."""
    patch = np.random.RandomState(0).standard_normal((k, k))
    basis = dct_basis(k, normalization='ortho', dtype=torch.float64).numpy()
    ours = np.tensordot(basis, patch, axes=2).reshape(k, k)
    np.testing.assert_allclose(ours, scipy.fft.dctn(patch, type=2, norm='ortho'), atol=1e-12)


@pytest.mark.parametrize('normalization', NORMALIZATIONS)
@pytest.mark.parametrize('smoothness', [None, 1.0])
@pytest.mark.parametrize('k', SIZES)
def test_functions_are_scaled_dct_functions(k, smoothness, normalization):
    """A basis scales the DCT functions, so that they stay orthogonal."""
    for level in (None, *range(1, 2 * k)):
        for dc in {True, 1 in (k, level)}:
            basis = dct_basis(k, level, dc, normalization, smoothness, dtype=torch.float64)
            expected = reference.dct_functions(k, level, dc, normalization='ortho')
            scales = torch.einsum('nxy,nxy->n', basis, expected)
            assert (scales > 0).all()
            torch.testing.assert_close(basis, expected * scales[:, None, None], rtol=0, atol=1e-14)


def test_normalizations_differ():
    """A name without functions of its own is a copy of another."""
    bases = [dct_basis(3, normalization=normalization) for normalization in NORMALIZATIONS]
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(bases, 2))


@pytest.mark.parametrize(
    'options',
    [dict(normalization='l1'), dict(normalization='ortho'), *(dict(smoothness=s) for s in (0, 0.5, 2.0, 10))],
)
@pytest.mark.parametrize('k', SIZES)
def test_basis_is_the_formula(k, options, dtype):
    for level in (None, *range(1, 2 * k)):
        for dc in (True, False):
            if not dc and 1 in (k, level):
                continue
            ours = dct_basis(k, level, dc, **options, dtype=dtype)
            expected = reference.dct_functions(k, level, dc, **options).to(dtype)
            rtol, atol = (1e-13, 1e-15) if dtype == torch.float64 else (1e-6, 1e-7)
            torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)
            if 'smoothness' in options:
                assert torch.equal(ours, dct_basis(k, level, dc, 'ortho', **options, dtype=dtype))


def test_order_is_rows_outer():
    assert dct_frequencies(3, 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert dct_frequencies(2, dc=False) == [(0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize('normalization', NORMALIZATIONS)
@pytest.mark.parametrize('smoothness', [None, 0, 3, 10])
@pytest.mark.parametrize('k', [2, 7])
def test_projecting_inverts_composing(k, smoothness, normalization):
    filters = torch.randn(5, 4, k, k, dtype=torch.float64)
    basis = dct_basis(k, normalization=normalization, smoothness=smoothness, dtype=torch.float64)
    torch.testing.assert_close(compose(project(filters, basis), basis), filters)


@pytest.mark.parametrize('normalization', NORMALIZATIONS)
def test_projection_on_a_low_level_is_the_nearest(normalization):
    """With fewer functions the approximation is the one of least squares: the rest is orthogonal to the functions."""
    filters = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    basis = dct_basis(3, 2, normalization=normalization, dtype=torch.float64)
    rest = filters - compose(project(filters, basis), basis)
    assert torch.einsum('oixy,nxy->oin', rest, basis).abs().max() < 1e-14


def test_default_dtype_and_device():
    assert dct_basis(3).dtype == torch.get_default_dtype()
    with torch.device('meta'):
        basis = dct_basis(3, device='cpu')
    torch.testing.assert_close(basis, reference.dct_functions(3).float())
    assert dct_basis(3, device='meta').device.type == 'meta'


@pytest.mark.parametrize(
    ('args', 'error', 'words'),
    [
        (dict(kernel_size=0), ValueError, 'kernel_size must be at least 1, got 0'),
        (dict(kernel_size=2.0), TypeError, r'kernel_size must be an integer, got 2\.0'),
        (dict(kernel_size=True), TypeError, 'kernel_size must be an integer, got True'),
        (dict(level=0), ValueError, 'level must be None or an integer from 1 to 5 .*, got 0'),
        (dict(level=6), ValueError, 'level must be None or an integer from 1 to 5 .*, got 6'),
        (dict(level=2.5), TypeError, 'level must be None or an integer'),
        (dict(level=True), TypeError, 'level must be None or an integer'),
        (dict(level=1, dc=False), ValueError, 'leave no function'),
        (dict(kernel_size=1, dc=False), ValueError, 'leave no function'),
        (dict(smoothness=-1), ValueError, 'smoothness must be None or a number from 0 to 10, got -1'),
        (dict(smoothness=11), ValueError, 'smoothness must be None or a number from 0 to 10, got 11'),
        (dict(smoothness=float('nan')), ValueError, 'smoothness must be None or .* got nan'),
        (dict(smoothness='1'), TypeError, "smoothness must be None or a number from 0 to 10, got '1'"),
        (dict(smoothness=True), TypeError, 'smoothness must be None or .* got True'),
        (dict(normalization='l2'), ValueError, "normalization must be one of .* got 'l2'"),
    ],
)
def test_bad_arguments(args, error, words):
    with pytest.raises(error, match=words):
        dct_basis(**dict(dict(kernel_size=3), **args))
