"""Progress from the output of jobs: recorded output, and output that only looks like progress."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.logs.clean import clean
from tailspan.logs.page import LineRun, LogPage
from tailspan_agent.analysis.progress import ProgressMeter, Reading, read_line
from tests.fakes.agents import Bench, looped, until
from tests.property.effort import assert_linear

RECORDED = Path(__file__).parents[3] / "data" / "progress"
S = 1_000_000_000


def states(name: str) -> list[str]:
    """Return every state that a recorded terminal showed, cleaned."""
    raw = (RECORDED / f"{name}.txt").read_bytes().replace(b"\n", b"\r")
    return [clean(state) for state in raw.split(b"\r") if state.strip()]


@pytest.mark.parametrize(
    ("name", "found", "ends_at"),
    [
        ("tqdm", 42, 1.0),
        ("tqdm-nested", 38, 1.0),
        ("pip", 68, 1.0),
        ("pytest", 3, 1.0),
        ("pytest-v", 50, 1.0),
        ("spark", 23, 0.95),
        ("wget-dot", 6, 1.0),
        ("wget-bar", 10, 1.0),
    ],
)
def test_recorded_output(name: str, found: int, ends_at: float) -> None:
    """Real output of programs: every bar is read, nothing else is, and progress only grows."""
    readings = [reading for text in states(name) if (reading := read_line(text))]
    fractions = [reading.fraction for reading in readings]
    assert (len(fractions), fractions[-1]) == (found, ends_at)
    if name != "tqdm-nested":
        assert fractions == sorted(fractions)


@pytest.mark.parametrize(
    ("text", "fraction", "left_s"),
    [
        ("  5%|5         | 50/1.00k [00:10<03:10, 5.00it/s]", 0.05, 190),
        ("100%|##########| 2.00k/2.00k [1:00:10<1:00:00,  9.00s/it]", 1.0, 3600),
        (" 12%|1         | 1/8 [00:00<?, ?it/s]", 0.125, None),
        ("Working... ━━━━━━━━╸━━━━━━━━━━━ 40% 0:00:12", 0.4, 12),
        ("  45/100 [============>.................] - ETA: 5s - loss: 0.3", 0.45, 5),
        ("25/100 ━━━━━━━━━━━━━━━━━━━━ 12s 34ms/step - loss: 0.31", 0.25, None),
        ("[Stage 1:==>  (10 + 2) / 40][Stage 2:>   (0 + 2) / 40]", 0.25, None),
        (
            "INFO TaskSetManager: Finished task 3.0 in stage 0.0 (TID 3) in 4 ms on vm (executor driver) (4/40)",
            0.1,
            None,
        ),
        ("[gw1] [ 45%] PASSED tests/test_a.py::test_b", 0.45, None),
        ("[ 50%] Building CXX object a.o", 0.5, None),
        ("[12/48] Linking CXX executable b", 0.25, None),
        ("  1,234,567  45%    1.20MB/s    0:00:12", 0.45, None),
        ("2024-05-12 12:00:00,123 INFO etl: processed 45 of 100 files", 0.45, None),
        ("2024-05-12T12:00:00Z [INFO] step 1,500/3,000: loss 0.2", 0.5, None),
        ("Processing file 3 of 12.", 0.25, None),
        ("rendered 900/1000 tiles", 0.9, None),
        ("day 73 of 365: loading partition", 0.2, None),
        ("rendering:  14%|##                  | 700/5000", 0.14, None),
        ("Progress: 45.5%", 0.455, None),
        ("Downloading... 45%", 0.45, None),
        ("sync is 45% complete, eta 90s", 0.45, 90),
        ("[#####     ] 50%", 0.5, None),
        ("45%", 0.45, None),
        ("0%", 0.0, None),
    ],
)
def test_formats_of_progress(text: str, fraction: float, left_s: float | None) -> None:
    """The formats in which programs print progress and time left."""
    assert read_line(text) == Reading(pytest.approx(fraction), left_s)


@pytest.mark.parametrize(
    ("text", "fraction"),
    [("Epoch 3/10", 0.2), ("epoch: [3/10] loss=0.3", 0.3), ("Epoch 10 of 10 finished", 1.0), ("Epoch 1/3", 0.0)],
)
def test_epochs(text: str, fraction: float) -> None:
    """An epoch that starts has ended the ones before; an epoch with a loss has ended too."""
    reading = read_line(text)
    assert reading is not None
    assert reading.fraction == pytest.approx(fraction)
    assert reading.epochs in (3, 10)


@pytest.mark.parametrize(
    "text",
    [
        "backup of 1/2/2024 is done",
        "on 1/2 we start",
        "2024/05/12 12:00:00 INFO ready",
        "12/05/2024 processing began",
        "ratio 3/4, odds 1/5",
        "I am 100% sure",
        "done 100% sure",
        "we are 45% confident of it",
        "CPU 45%, memory 80% used",
        "disk usage: 93%",
        "accuracy: 45%",
        "TOTAL    120     12    90%",
        "discount applied [50%]",
        "price 50% off",
        "/srv/data/1/2/file",
        "tile 12/2048/1361 written",
        "GET /api/v1/2 HTTP/1.1",
        "10.0.0.1/24 is up",
        "192.168.1.1/32 done",
        "retry 3/5",
        "attempt 2 of 3",
        "3 of 10 files failed",
        "processed 45 of 100 files: 3 errors, retrying",
        "step 5/4",
        "step 0/0",
        "progress: 145%",
        "loss 12% -> 8%",
        "-45%",
        "version 1/2.5",
        "1 of 2 things that I like",
        "45it [00:10, 4.5it/s]",
        "file " + "9" * 300 + "/" + "9" * 300,
        "",
        "%",
        "/",
    ],
)
def test_text_that_looks_like_progress(text: str) -> None:
    """Dates, ratios, paths, addresses, loads, shares and attempts are not progress: a wrong bar is worse than none."""
    assert read_line(text) is None


@given(st.text(max_size=600) | st.from_regex(r"[0-9%/\[\]|:. ━a-z]{0,500}"))
def test_any_line_is_read_without_harm(text: str) -> None:
    """Any output gives a fraction between 0 and 1, or nothing."""
    reading = read_line(text)
    assert reading is None or 0 <= reading.fraction <= 1


@pytest.mark.parametrize(
    "unit",
    ["1/", "9 ", "[", "━ ", "% ", "processed ", "1,", "100%|", "step 1/2/", "a/b.py", "epoch ", "(", "Finished task "],
)
def test_hostile_lines_cost_no_more_than_others(unit: str) -> None:
    """No expression backtracks: a long line of any repetition takes as long as its length."""
    assert_linear(lambda text: [read_line(text) for _ in range(20)], lambda size: (unit * size)[:size] + "%", 100)
    read_line(unit * (200_000 // len(unit)) + "%")


def see(meter: ProgressMeter, *lines: str, at_s: float) -> None:
    meter.add_page(LogPage([line.encode() for line in lines], [LineRun(len(lines), int(at_s * S))], b""), at_s)


def test_the_pace_makes_the_time_left() -> None:
    """If the bar has no time left, it is estimated from its pace; a bar that starts again has its own pace."""
    meter = ProgressMeter()
    see(meter, "step 10/100", at_s=100)
    assert meter.progress is not None
    assert (meter.progress.fraction, meter.progress.eta_s) == (0.1, None)
    see(meter, "step 20/100", "saved", at_s=110)
    assert meter.progress.fraction == 0.2
    assert meter.progress.eta_s == pytest.approx(80)
    see(meter, "step 0/100", at_s=200)
    assert (meter.progress.fraction, meter.progress.eta_s) == (0.0, None)
    see(meter, "step 50/100", at_s=250)
    assert meter.progress.eta_s == pytest.approx(50)


def test_a_bar_within_an_epoch_is_a_part_of_it() -> None:
    """Half of the second of four epochs is three eighths of the job, whatever time left the bar has."""
    meter = ProgressMeter()
    see(meter, "Epoch 2/4", " 50%|#####     | 5/10 [00:05<00:05, 1.0it/s]", at_s=10)
    assert meter.progress is not None
    assert (meter.progress.fraction, meter.progress.eta_s) == (0.375, None)


def test_a_page_is_read_once_a_second_or_on_demand() -> None:
    """The last page is always read, however quiet the job is afterwards."""
    meter = ProgressMeter(lambda text: text.replace("secret", "***"))
    see(meter, "step 1/10", at_s=1.0)
    see(meter, "step 2/10 secret", at_s=1.5)
    assert meter.progress is not None
    assert (meter.progress.fraction, meter.progress.text) == (0.2, "step 2/10 ***")


def test_a_long_bar_that_overwrites_itself() -> None:
    """An hour of carriage returns is one line: its last state counts. A long line without them is not a bar."""
    meter = ProgressMeter()
    see(meter, "x" * 5000 + " step 1/2", at_s=1)
    assert meter.progress is None
    see(meter, "".join(f"\rstep {number}/5000" for number in range(4000)), at_s=3)
    assert meter.progress is not None
    assert meter.progress.text == "step 3999/5000"


@looped
async def test_a_followed_job_shows_its_progress(bench: Bench) -> None:
    """From the line to the metric and the page; it disappears with the job."""
    bench.fake.add_job("j1", job_name="etl")
    async with bench.running() as agent:
        bench.fake.add_lines("j1", "tiles:  25%|##5       | 25/100 [00:05<00:15,  5.00it/s]")
        await until(lambda: any(assessment.progress for _, assessment in agent.followed_jobs()))
        ((_, assessment),) = agent.followed_jobs()
        assert assessment.progress == 0.25
        assert assessment.eta_s == pytest.approx(15, abs=2)
        text = agent.metrics_reader.prometheus_text()[0].decode()
        assert 'tailspan_job_progress_ratio{cicd_pipeline_name="etl"} 0.25' in text
        bench.fake.set_state("j1", "SUCCEEDED")
        await bench.received(lambda: "run" in bench.spans("j1"))
        assert "tailspan_job_progress_ratio{" not in agent.metrics_reader.prometheus_text()[0].decode()
