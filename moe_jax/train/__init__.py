"""One optimizer step: loss, gradients, state, metrics, and steps that are skipped."""
