"""Writes docs/templates.md: what is trained on of a dialogue, by chat template.

`make templates` runs it. The rows are rendered by the trainer's own code.
"""
