"""Pages of log lines and what is done with them: cleaning, following, printing, the wire format of pages.

The line and page model belongs here; nothing here may know a job service.
"""
