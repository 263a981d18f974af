"""A run directory and its life: checkpoints, configuration, log, faults."""
