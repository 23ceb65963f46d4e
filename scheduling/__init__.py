"""Pure planning on plain data: which samples share a microbatch, in which order, and what each stage does. No tensor, no clock, no GPU."""
