"""The files and the supervisor of jobs on this machine."""
