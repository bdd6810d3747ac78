"""What pytest does with signals that were ignored when it started."""

from __future__ import annotations

import subprocess
import sys

_IGNORED = "SIGINT SIGQUIT SIGHUP SIGTERM SIGUSR1 SIGWINCH"
_CHILD = f"""
import signal
print([name for name in "{_IGNORED}".split() if signal.getsignal(signal.Signals[name]) is signal.SIG_IGN])
"""
_PARENT = f"""
import os, signal, subprocess, sys
from tests.leftovers import handle_ignored_signals
for name in '{_IGNORED}'.split():
    signal.signal(signal.Signals[name], signal.SIG_IGN)
handle_ignored_signals()
subprocess.run([sys.executable, "-c", {_CHILD!r}], check=True)
os.kill(os.getpid(), signal.SIGHUP)
print("goes on")
"""


def test_children_start_with_no_signal_ignored():
    """`nohup make test &` gives each test the same signals as a terminal, and a hangup does not end it."""
    out = subprocess.run([sys.executable, "-c", _PARENT], capture_output=True, text=True, check=True).stdout
    assert out == "[]\ngoes on\n"
