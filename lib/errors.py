"""The one exception that a user is meant to see."""


class UserError(Exception):
    """What went wrong and what to do next, in one line. `main.py` prints it and exits with 2."""
