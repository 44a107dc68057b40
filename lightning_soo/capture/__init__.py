"""K-FAC's view of a model: inputs of its layers and gradients of their outputs, one file per layer family."""
