"""What a supervisor reports to its runner on the status socket.

`tailspan run` imports this before it starts the command: nothing here may import slowly.
"""

from __future__ import annotations

import os

__all__ = ["Ended", "read_events"]


class Ended:
    """The end of a job's main process, as its supervisor reports it.

    Attributes:
        state: The job's state.
        exit_code: The exit code as a shell has it: 128 + n after signal n.
        signal: The number of the signal that ended it, or 0.
        relay_failures: The errno of each output that could not be passed on.
        not_captured: Why output is missing in the log; None: it is complete.
        lost_bytes: How much is missing.
    """

    def __init__(self, event: dict[str, object], problem: dict[str, object]) -> None:
        self.state = str(event["state"])
        self.exit_code = _number(event["exit_code"])
        self.signal = _number(event["signal"])
        failures = event["relay_failures"]
        self.relay_failures = list(failures) if isinstance(failures, list) else []
        self.not_captured = str(problem["not_captured"]) if problem else None
        self.lost_bytes = _number(problem.get("lost_bytes", 0))


def read_events(fd: int, buffer: bytearray, ended: list[Ended]) -> bool:
    """Read what was reported; return False when the supervisor is gone.

    Args:
        fd: The status socket.
        buffer: What was read and is not whole yet, and events that the end refers to.
        ended: Takes the end of the job.
    """
    alive = True
    try:
        while part := os.read(fd, 4096):
            buffer += part
            if b'"ended": true' in part and part.endswith(b"\n"):
                break
        else:
            alive = False
    except BlockingIOError:
        pass
    except OSError:
        alive = False
    if b'"ended": true' in buffer and buffer.endswith(b"\n"):
        events = [_parse(line) for line in bytes(buffer).splitlines()]
        problems = [event for event in events if "not_captured" in event]
        ended += [Ended(event, problems[-1] if problems else {}) for event in events if "ended" in event]
        buffer.clear()
    return alive or bool(ended)


def _parse(line: bytes) -> dict[str, object]:
    # The supervisor writes plain literals, which cost nothing to read; `json` costs 5 ms.
    text = line.decode("utf-8", "replace")
    if text.startswith('{"ended": true, "state": "'):
        state, _, rest = text[len('{"ended": true, "state": "') :].partition('", "exit_code": ')
        code, _, rest = rest.partition(', "signal": ')
        number, _, rest = rest.partition(', "relay_failures": [')
        failures = [int(one) for one in rest.rstrip("]}").split(",") if one.strip()]
        return {
            "ended": True,
            "state": state,
            "exit_code": int(code),
            "signal": int(number),
            "relay_failures": failures,
        }
    if '"not_captured"' in text:
        import json

        event: dict[str, object] = json.loads(text)
        return event
    return {}


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
