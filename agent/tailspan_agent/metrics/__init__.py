"""The metrics of agent, jobs and pipelines, for OTLP and for Prometheus.

Instruments, snapshots and their formats belong here; nothing here may decide what the agent does next.
"""
