"""Compiles programs for machines that are not present."""
