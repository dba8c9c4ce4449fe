"""The exceptions that a user is meant to see."""


class UserError(Exception):
    """What went wrong and what to do next, in one line. `main.py` prints it and exits with 2."""


class OutOfMemoryUserError(UserError):
    """What did not fit into memory: nothing is wrong with it, so it is not to be taken for damage."""
