"""Several agents that share jobs through PostgreSQL: who follows which job, and the checkpoint store that they share.

All that uses the fleet's database belongs here; only an agent with a section ``[fleet]`` imports it. Nothing here may
read a job service or send telemetry.
"""
