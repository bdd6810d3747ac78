"""What can be concluded from a job's lines and its pipeline's past runs.

Pure analysis belongs here: progress, failures, baselines, assessments; nothing here may do I/O.
"""
