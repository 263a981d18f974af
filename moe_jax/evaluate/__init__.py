"""What a model does: held-out text, samples, the choices of its router, figures."""
