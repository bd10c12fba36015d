"""Options and fixtures that several test files share."""

import pytest


def pytest_addoption(parser):
    parser.addoption(
        '--every-model', action='store_true', help="run timm's own tests on every harm* model, not on a selection"
    )


@pytest.fixture(params=['float32', 'float64'])
def dtype(request):
    import torch

    return getattr(torch, request.param)
