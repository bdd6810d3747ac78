"""From job services to pages of lines: discovery, tailers, poll schedules and read limits.

What decides when a service is asked belongs here; nothing here may know how records are encoded or sent.
"""
