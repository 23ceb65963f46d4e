"""From records on disk to the tensors of a microbatch."""
