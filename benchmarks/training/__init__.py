"""Whole training steps, ours beside the alternatives: what is run, how it is measured, and the scripts that do it."""
