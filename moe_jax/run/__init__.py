"""A run directory and its life: checkpoints, configuration, logs, interruptions."""
