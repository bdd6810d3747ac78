"""Lines of a job as log records: framing, severity and redaction.

Pure work that is done for each line belongs here. Nothing here may read a log, keep state of a job or send.
"""
