"""OTLP messages as bytes: requests, log records, spans, JSON lines.

Wire formats belong here. Nothing here may depend on jobs or send a request.
"""
