"""Pure planning on plain data: which samples share a microbatch, in which order microbatches enter the pipeline, and what each stage does.

Imports the standard library only (numpy where it pays); knows nothing of tensors, models or the trainer.
"""
