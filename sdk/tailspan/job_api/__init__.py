"""`tailspan serve`: the Fused wire protocol over any job service. Internal.

The server's endpoints and access rules belong here; nothing here may be needed by a client.
"""
