"""Requests on their way to an endpoint: exporters, outcomes, retry, dead letter.

What knows about transports and their answers belongs here; nothing here may know jobs, pages or checkpoints.
"""
