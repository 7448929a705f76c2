"""The one error that users see: it is raised anywhere in localcluster and printed by cli.

It is printed without a traceback.
"""


class LocalClusterError(Exception):
    """An error whose message names what is wrong, the value and the remedy."""
