"""The verbs of the command line, and the processes that they start."""
