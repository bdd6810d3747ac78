"""The files and the supervisor of jobs on this machine. Internal.

Capture, storage and reading of local jobs belong here, with the standard library only; nothing here may import slowly.
"""
