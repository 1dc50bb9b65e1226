"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something that the user can put right: what is wrong, where, and what to do, in one sentence.

    Commands print its text without a traceback and exit with status 2.
    """
