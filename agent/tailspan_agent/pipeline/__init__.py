"""From a page of lines to an acknowledged checkpoint: job pipelines and send queues.

What holds lines between their reading and their acknowledgement belongs here; nothing here may call a job service.
"""
