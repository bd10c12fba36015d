"""The DCT basis by its mathematical properties."""

import numpy as np
import pytest
import reference
import scipy.fft
import torch

from timm_harmonic import dct_basis
from timm_harmonic.layers.compose import compose
from timm_harmonic.layers.dct import NORMALIZATIONS, dct_frequencies, project

SIZES = [1, 2, 3, 4, 5, 7, 8]


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
    """A basis scales the DCT functions, so that they stay orthogonal and pooling computes the response to the first."""
    basis = dct_basis(k, None, True, normalization, smoothness, dtype=torch.float64)
    expected = reference.dct_functions(k, normalization='ortho')
    scales = torch.einsum('nxy,nxy->n', basis, expected)
    assert (scales > 0).all()
    torch.testing.assert_close(basis, expected * scales[:, None, None], rtol=0, atol=1e-14)


@pytest.mark.parametrize('k', SIZES)
def test_normalizations(k):
    ones = torch.ones(k * k, dtype=torch.float64)
    energy = dct_basis(k, normalization='ortho', dtype=torch.float64).flatten(1).square().sum(1)
    torch.testing.assert_close(energy, ones, rtol=0, atol=1e-14)
    lengths = dct_basis(k, normalization='l1', dtype=torch.float64).flatten(1).abs().sum(1)
    torch.testing.assert_close(lengths, ones, rtol=0, atol=1e-14)


@pytest.mark.parametrize('k', SIZES)
@pytest.mark.parametrize('normalization', ['l1', 'ortho'])
def test_basis_is_the_formula(k, normalization, dtype):
    for level in (None, *range(1, 2 * k)):
        for dc in (True, False):
            if not dc and 1 in (k, level):
                continue
            expected = reference.dct_functions(k, level, dc, normalization).to(dtype)
            ours = dct_basis(k, level, dc, normalization, dtype=dtype)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-15 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize('smoothness', [0, 0.5, 1, 2.0, 10])
@pytest.mark.parametrize('k', SIZES)
def test_smoothness_is_the_formula(k, smoothness, dtype):
    for level in (None, *range(1, 2 * k)):
        for dc in (True, False):
            if not dc and 1 in (k, level):
                continue
            ours = dct_basis(k, level, dc, smoothness=smoothness, dtype=dtype)
            torch.testing.assert_close(ours, reference.dct_functions(k, level, dc, smoothness=smoothness).to(dtype))
            assert torch.equal(ours, dct_basis(k, level, dc, 'ortho', smoothness, dtype=dtype))
            energy = ours.double().square().sum((1, 2))
            assert energy.mean().item() == pytest.approx(1, rel=1e-6)
            sums = torch.tensor([float(i + j) for i, j in dct_frequencies(k, level, dc)], dtype=torch.float64)
            falls = energy * (1 + sums) ** (2 * smoothness)
            torch.testing.assert_close(falls, falls[:1].expand_as(falls), rtol=1e-5, atol=0)


@pytest.mark.parametrize('k', SIZES)
def test_smoothness_zero_is_orthonormal(k):
    assert torch.equal(dct_basis(k, smoothness=0), dct_basis(k, normalization='ortho'))


@pytest.mark.parametrize('k', SIZES)
def test_number_of_frequencies(k):
    """Triangular numbers up to level k. Above, the triangle at the other corner is missing."""
    for level in range(1, 2 * k):
        missing = 2 * k - 1 - level
        expected = level * (level + 1) // 2 if level <= k else k * k - missing * (missing + 1) // 2
        assert len(dct_frequencies(k, level)) == expected
    assert len(dct_frequencies(k, 2 * k - 1)) == len(dct_frequencies(k)) == k * k


def test_order_is_rows_outer():
    assert dct_frequencies(3, 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert dct_frequencies(2, dc=False) == [(0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize('options', [dict(), dict(normalization='ortho'), *(dict(smoothness=s) for s in (0, 1, 3, 10))])
@pytest.mark.parametrize('k', [2, 3, 7])
def test_projecting_inverts_composing(k, options):
    filters = torch.randn(5, 4, k, k, dtype=torch.float64)
    basis = dct_basis(k, **options, dtype=torch.float64)
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
        (dict(kernel_size=3, level=0), ValueError, 'level must be None or an integer from 1 to 5 .*, got 0'),
        (dict(kernel_size=3, level=6), ValueError, 'level must be None or an integer from 1 to 5 .*, got 6'),
        (dict(kernel_size=3, level=2.5), TypeError, 'level must be None or an integer'),
        (dict(kernel_size=3, level=True), TypeError, 'level must be None or an integer'),
        (dict(kernel_size=3, level=1, dc=False), ValueError, 'leave no function'),
        (dict(kernel_size=1, dc=False), ValueError, 'leave no function'),
        (dict(kernel_size=3, smoothness=-1), ValueError, 'smoothness must be None or a number from 0 to 10, got -1'),
        (dict(kernel_size=3, smoothness=11), ValueError, 'smoothness must be None or a number from 0 to 10, got 11'),
        (dict(kernel_size=3, smoothness=float('nan')), ValueError, 'smoothness must be None or .* got nan'),
        (dict(kernel_size=3, smoothness='1'), TypeError, "smoothness must be None or a number from 0 to 10, got '1'"),
        (dict(kernel_size=3, smoothness=True), TypeError, 'smoothness must be None or .* got True'),
        (dict(kernel_size=3, normalization='l2'), ValueError, "normalization must be one of .* got 'l2'"),
    ],
)
def test_bad_arguments(args, error, words):
    with pytest.raises(error, match=words):
        dct_basis(**args)
