"""The stages of the GPU check, each of which is a separate program."""
