"""From a job's page of lines to an acked checkpoint: job pipelines and send queues.

What holds lines between reading and ack belongs here; nothing here may ask a job service.
"""
