"""The commands of `tailspan agent`, `tailspan doctor` and `tailspan demo`.

What one command does belongs here; options belong in `tailspan_agent.cli`. No other package may import this one.
"""
