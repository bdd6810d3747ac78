"""Conclusions from a job's lines and from earlier runs of its pipeline.

Pure analysis belongs here: progress, failures, baselines, assessments. Nothing here may do I/O.
"""
