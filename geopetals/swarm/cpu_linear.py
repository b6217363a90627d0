"""Linear layers in float32 on a CPU, computed by oneDNN instead of the BLAS that PyTorch was built with.

A decode step multiplies a few rows with each weight. oneDNN then takes about as long for eight rows as for one, and so
batches pay; MKL does not, on AMD's processors above all. Measured with all weights of SmolLM2-135M's blocks on one core
of an EPYC, ms by MKL and by oneDNN: 27 and 22 for 1 row, 40 and 22 for 2, 48 and 24 for 8, 65 and 30 for 16, 306 and
134 for 128. Weights take no more memory: they are laid out so that those of one input lie together, but where these
would be whole pages: then rows of a product fall on the same few places of the caches. For 4096 outputs of 4096 inputs,
ms of MKL, oneDNN with that layout, and with the usual one: 3.0, 6.3, 2.5 for 1 row, 7.1, 6.7, 4.5 for 8.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

_PAGE = 4096 // 4


def use_onednn(model: nn.Module) -> int:
    """Let oneDNN compute the plain linear layers of `model` that are float32 on the CPU; how many these are.

    Gradients go the usual way. Nothing happens where this PyTorch has no oneDNN, or another one than we know.
    """
    if not _is_known():
        return 0
    layers = [module for module in model.modules() if type(module) is nn.Linear and _fits(module.weight)]
    for layer in layers:
        if layer.out_features % _PAGE:
            layer.weight.data = layer.weight.data.t().contiguous().t()
        layer.__class__ = _OneDnnLinear
    return len(layers)


class _OneDnnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        return _product(input, self.weight, self.bias)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], ""))


def _fits(weight: Any) -> bool:
    return bool(weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.dim() == 2)


@torch.inference_mode()
def _is_known() -> bool:
    """The operator is PyTorch's own, for compiled models, and no public one: asked before it is relied on."""
    if not torch.backends.mkldnn.is_available():
        return False
    rows, weight = torch.linspace(-1, 1, 6).view(2, 1, 3), torch.linspace(-1, 2, 12).view(3, 4).t()
    bias = torch.ones(4)
    try:
        found = _product(rows, weight, bias)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return found.shape == (2, 1, 4) and torch.allclose(found, nn.functional.linear(rows, weight, bias), atol=1e-5)
