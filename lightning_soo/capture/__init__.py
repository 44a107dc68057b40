"""K-FAC's view of a model: inputs of its layers and gradients of their outputs, one file per layer family."""

# each registers the rules of its family
from lightning_soo.capture import attention, convolution, embedding, linear, normalization

__all__ = ["attention", "convolution", "embedding", "linear", "normalization"]
