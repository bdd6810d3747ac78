"""Export of OTLP requests: exporters, outcomes, retry, dead letter.

Transports and their responses belong here. Nothing here may depend on jobs, pages or checkpoints.
"""
