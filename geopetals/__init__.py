"""GeoPETALS: serve one large language model over GPUs that stand anywhere on the Internet."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "GeoPetalsError",
    "InferenceSession",
    "__version__",
]

if TYPE_CHECKING:
    from geopetals.client.classification import AutoDistributedModelForSequenceClassification
    from geopetals.client.model import AutoDistributedModelForCausalLM
    from geopetals.client.session import InferenceSession
    from geopetals.errors import GeoPetalsError

_HOME = {
    "AutoDistributedModelForCausalLM": "geopetals.client.model",
    "AutoDistributedModelForSequenceClassification": "geopetals.client.classification",
    "InferenceSession": "geopetals.client.session",
    "GeoPetalsError": "geopetals.errors",
}


def __getattr__(name: str) -> Any:
    """Load the client library on first use: planning and `--help` must not pay for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
