"""Training: tasks, data, configuration, the loop and its checkpoints."""
