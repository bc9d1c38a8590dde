"""The one exception that stands for a user's mistake; it depends on nothing."""


class QccError(Exception):
    """Bad input or a missing need: the command line prints its one line and exits with 2.

    The text says where, the offending value, what is allowed and what to do.
    """
