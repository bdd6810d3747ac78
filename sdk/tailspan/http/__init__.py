"""The one HTTP client of both packages, and the limits of their servers. Internal.

Connections, limits and errors of HTTP belong here; nothing here may know the protocol of a service.
"""
