"""What a user can get wrong.

One class: its message is one line that names the key, the value and what would be right. The command line prints that line
and ends with status 2; nothing else in the project catches it.
"""


class UserError(ValueError):
    """Wrong input: a config key, a file, a model, a machine that does not fit. The message is one line with the remedy."""


def one_line(message: object, limit: int = 240) -> str:
    """Squeeze a message of another library into one line of at most `limit` characters."""
    line = " ".join(str(message).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
