"""The commands of `tailspan agent`, `tailspan doctor` and `tailspan demo`.

What one command does belongs here, options excepted (`tailspan_agent.cli`); nothing else may import it.
"""
