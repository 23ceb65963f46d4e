"""What a run leaves and shows: directory, states, checkpoints, numbers."""
