"""Compares runs: their settings, losses, benchmarks, balance and specialisation, in tables and figures."""
