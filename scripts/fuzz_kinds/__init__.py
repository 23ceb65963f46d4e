"""What fuzz_inputs.py can spoil: one module for each kind of input.

A module has `make(directory)`, which writes a small valid input; `MUTATIONS`, functions that take a
random.Random and the directory, change one thing there and return a word on it; and
`read(directory)`, the path that a run takes to read it. `agree(directory)`, where there is one,
compares what was read with what the library that others use makes of it: it raises AssertionError
where they differ, and returns that library's complaint where it has one.
"""
