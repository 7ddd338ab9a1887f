"""The coordinator: training loop, evaluation, run directory and checkpoints."""
