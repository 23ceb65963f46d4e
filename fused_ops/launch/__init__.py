"""What launching any kernel needs: which twin runs, what the device and its Triton can do, early starts, cache keys, timing."""
