"""The metrics of agent, jobs and pipelines, for OTLP and for Prometheus.

Instruments, snapshots and their formats belong here. Nothing here may decide what the agent does next.
"""
