"""The contract between the operator, the trainer and the command line: the FineTuneJob resource, the run
configuration that a pod gets, the events and progress that it reports, and the result that it leaves.

Everybody imports this package; it imports nobody and does no I/O.
"""

from finetune_api.names import API_VERSION, GROUP, KIND, PLURAL, VERSION

__all__ = ["API_VERSION", "GROUP", "KIND", "PLURAL", "VERSION", "__version__"]

__version__ = "0.1.0"
