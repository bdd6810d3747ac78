"""The agent as a process: signals, systemd, logging and reload.

What concerns the operating system process belongs here; nothing here may know the data that flows through it.
"""
