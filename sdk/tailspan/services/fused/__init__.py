"""Jobs of a Fused job API, the hosted one or any server that speaks its wire protocol.

The protocol, its credentials and its log semantics belong here; nothing outside this package may know them.
"""

from tailspan.services.fused.service import FusedService

__all__ = ["FusedService"]
