"""Defines the contract between the operator, the trainer and the command line.

It consists of the FineTuneJob resource, the run configuration that a pod gets, the events and the
progress that it reports, and the result that it writes. The other packages import this one; it
imports none of them and does no I/O.
"""

from finetune_api.names import API_VERSION, GROUP, KIND, PLURAL, VERSION

__all__ = ["API_VERSION", "GROUP", "KIND", "PLURAL", "VERSION", "__version__"]

__version__ = "0.1.0"
