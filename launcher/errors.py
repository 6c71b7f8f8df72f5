"""The one exception for whatever the user can put right. It imports nothing, so every room may."""


class InputError(Exception):
    """Wrong configuration or input; the commands print it without a traceback and exit with 2.

    The message has one line per problem: the field or file, what was seen, what was expected and
    what to change.
    """
