"""Shows the steps of a long command: what it is doing, for how long, and how long it should take.

It uses only the standard library, since it runs before the project's environment exists.
"""

from steps.checks import Problem, check
from steps.command import attached, run_command
from steps.runner import Step, StepFailed, Steps

__all__ = ["Problem", "Step", "StepFailed", "Steps", "attached", "check", "run_command"]
