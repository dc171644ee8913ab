"""The one error that a user can cause."""


class BestiaryError(Exception):
    """Something that the user can put right: its text is one plain sentence, shown without a traceback."""
