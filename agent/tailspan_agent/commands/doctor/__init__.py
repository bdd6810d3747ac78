"""`tailspan doctor`: diagnostics for a bug report, without secrets.

Code that collects and prints diagnostics belongs here; nothing here may change state.
"""
