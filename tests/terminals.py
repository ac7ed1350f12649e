"""Commands on a terminal of their own, as a person has them."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

from tests.conftest import ROOT


def in_terminal(command: list[str], *, columns: int, limit_s: float = 60, **extra: str) -> str:
    """Run a command on a terminal of its own; return what it wrote there, its exit code in the last line."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    known = {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    environment = kept | known | extra
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT
    )
    os.close(theirs)
    text, until_s = b"", time.monotonic() + limit_s
    while time.monotonic() < until_s:
        if not select.select([ours], [], [], 0.2)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            text += os.read(ours, 65536)
        except OSError:
            break  # Linux says so when the last writer has closed it.
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"no end within {limit_s:g} s: {text.decode()}") from None
    finally:
        os.close(ours)
    return f"{text.decode()}\nexit code {code}"


def without_codes(text: str) -> list[str]:
    """Return the lines of what was written, without colours and movements."""
    return [line.strip("\r") for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).split("\n")]
