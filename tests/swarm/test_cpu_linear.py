import pytest
import torch
from torch import nn

from geopetals.swarm.cpu_linear import use_onednn
from geopetals.swarm.quantization import memory_bytes


class Other(nn.Linear):
    """A layer with ways of its own, as quantized ones have."""


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 1024, bias=False), nn.Sequential(nn.Linear(1024, 16)), Other(16, 8)).to(dtype)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_it_gives_what_the_layers_gave_for_any_number_of_rows_and_takes_no_more_memory() -> None:
    layers = model()
    inputs = [torch.randn(*shape, 48) for shape in ((1, 1), (8, 1), (2, 37), (3, 0))]
    inputs.append(torch.randn(6, 4, 48)[:, 2:3])
    with torch.inference_mode():
        expected = [layers(rows) for rows in inputs]
        held = memory_bytes(layers)
        assert use_onednn(layers) == 2
        found = [layers(rows) for rows in inputs]
    assert memory_bytes(layers) == held
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same() -> None:
    layers, rows = model().requires_grad_(False), torch.randn(2, 3, 48, requires_grad=True)
    (expected,) = torch.autograd.grad(layers(rows).sum(), [rows])
    use_onednn(layers)
    (found,) = torch.autograd.grad(layers(rows).sum(), [rows])
    torch.testing.assert_close(found, expected)


def test_layers_in_other_formats_stay_as_they_are() -> None:
    layers = model(torch.bfloat16)
    assert use_onednn(layers) == 0
    assert type(layers[0]) is nn.Linear  # type: ignore[index]
