"""Evaluates a model: held-out text, samples, the choices of its router, figures."""
