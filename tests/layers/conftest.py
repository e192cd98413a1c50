"""Fixtures of the layers' tests."""

import pytest
import torch

from .operator_inputs import needs_gpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def device(request) -> str:
    """Where tensors are."""
    return request.param


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
