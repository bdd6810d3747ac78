"""Jobs of AWS Batch and tasks of Amazon ECS, with their lines in CloudWatch Logs.

The wire formats of these APIs, their credentials and their quotas belong here; nothing outside this package may know
them, and only `requests` may import botocore.
"""

from tailspan.services.aws.batch import BatchService
from tailspan.services.aws.ecs import EcsService

__all__ = ["BatchService", "EcsService"]
