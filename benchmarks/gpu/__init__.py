"""The GPU check, which tests and times the trainer on a real GPU in minutes. See `__main__`."""
