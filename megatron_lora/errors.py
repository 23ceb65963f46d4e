"""The error for what a user can get wrong.

Its message is one line that names the key, the value and the remedy. The command line prints that
line and exits with status 2.
"""


class UserError(ValueError):
    """Wrong input: a config key, a file, a model or a machine that does not fit. The message is one line and ends with the remedy."""


def one_line(message: object, limit: int = 240) -> str:
    """Squeeze a message of another library into one line of at most `limit` characters."""
    line = " ".join(str(message).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
