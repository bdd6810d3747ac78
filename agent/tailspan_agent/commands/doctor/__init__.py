"""`tailspan doctor`: diagnostics for a bug report, without secrets.

What gathers and prints diagnostics belongs here; nothing here may change state.
"""
