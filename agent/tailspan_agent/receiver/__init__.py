"""From job services to pages of lines: discovery, tailers, poll schedules and read limits.

What decides when a service is polled belongs here; nothing here may encode or send records.
"""
