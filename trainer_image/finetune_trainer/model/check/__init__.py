"""The check of a model before hardware is allocated, as a program."""
