"""The one error that a person sees: raised anywhere in localcluster, printed by cli, never a traceback."""


class LocalClusterError(Exception):
    """What is wrong, with the value, and what to do about it."""
