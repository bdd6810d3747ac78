"""OTLP messages as bytes: requests, log records, spans, JSON lines.

Wire formats belong here; nothing here may know what a job is or talk to an endpoint.
"""
