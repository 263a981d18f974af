"""One optimizer step: loss, gradients, state, metrics."""
