"""The one error that a person sees: raised anywhere in images, printed by cli, never a traceback."""


class ImagesError(Exception):
    """What is wrong, with the value, and what to do about it."""
