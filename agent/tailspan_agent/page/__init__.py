"""The agent's own page: jobs, one job with its log, pipelines, the agent itself. Server-rendered, read-only but cancel.

shown     what the page may see of the agent (the seam; tests hand in their own)
board     which jobs there are, filtered and cut into pages (pure)
ended     the ended jobs, from the checkpoint store
log_view  the part of a log that somebody looks at, read through the job's service
present   times, durations and plots as people read them (pure)
session   who may see it: token, cookie, forms
views     the pages, and their live updates
"""
