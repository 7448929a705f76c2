"""Decides how a FineTuneJob ends whose output is cleaned when it is deleted."""
