"""The built-in services keep every promise of a job service."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tailspan.services import JobService
from tailspan.services.fused import FusedService
from tailspan.services.local import LocalService
from tailspan.testing import FakeService, ServiceConformance
from tests.fakes.job_api import FakeJobApi
from tests.fakes.local_jobs import LocalJobs
from tests.fakes.scripted_service import serving

_PROGRAM = "import sys\nfor number in range(12000): print(number)\nprint('error', file=sys.stderr)"


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a state directory with two ended jobs, one of several pages."""
    place = tmp_path_factory.mktemp("local")
    with LocalJobs(place) as jobs:
        jobs.run("true")
        jobs.run(sys.executable, "-c", _PROGRAM)
    return place


class TestLocalService(ServiceConformance):
    """Local jobs."""

    @pytest.fixture(autouse=True)
    def _use(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def make_service(self) -> JobService:
        """Return the service over the ended jobs."""
        return LocalService(state_dir=self._state_dir)


class TestFusedService(ServiceConformance):
    """A Fused job API, which knows lines by their times."""

    @pytest.fixture(autouse=True)
    def _use(self) -> Iterator[None]:
        with FakeJobApi() as api:
            job = api.add_job("j", job_status="Done")
            for number in range(20):
                job.line(f"line {number}", 1_000 + number // 3)
            self._url = api.base_url
            yield

    def make_service(self) -> JobService:
        """Return the service over the fake API."""
        return FusedService(base_url=self._url, requests_per_second=10_000)


class TestFusedServiceOverPages(ServiceConformance):
    """Our own job API, which sends log pages."""

    @pytest.fixture(autouse=True)
    def _use(self) -> Iterator[None]:
        service = FakeService(page_lines=3)
        service.add_job("j")
        service.add_lines("j", *"abcdefgh", timestamp_ms=1_000, step_ms=1)
        service.set_state("j", "SUCCEEDED")
        with serving(service) as server:
            self._url = server.url
            yield

    def make_service(self) -> JobService:
        """Return the service over the job API."""
        return FusedService(base_url=self._url, requests_per_second=10_000)
