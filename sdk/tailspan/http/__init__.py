"""The one HTTP client of the SDK: limits, errors and connections.

What every HTTP job service and server needs belongs here; nothing here may know a service's protocol.
"""
