"""Which completions are kept: those that a regular expression finds something in, or that a command says yes to.

REGEX         re.search over the text of the completion; (?s) in front lets a dot match line breaks
cmd:COMMAND   run without a shell, the text on stdin; exit status 0 keeps it. PERCARD_PROMPT holds the prompt's line of JSON,
              so that a checker finds the right answer there; output is thrown away, a run over the time limit is a no
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from dataclasses import dataclass

from ..formats.spec import FormatError
from ..formats.targets import guarded

COMMAND, PROMPT = "cmd:", "PERCARD_PROMPT"
LONGEST = (
    4096  # characters for which a regex must end soon; over longer texts it takes at most a power of the length more
)
_MOST = 100_000  # bytes of a line that is handed to a command: the kernel takes 128 kB for one variable


@dataclass(frozen=True)
class Keep:
    """words: as it was given, None = everything is kept. timeout: seconds that a command may take."""

    words: str | None
    timeout: float = 10.0
    regex: re.Pattern[str] | None = None
    command: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: str | None, timeout: float = 10.0) -> Keep:
        """FormatError for what is no regex, a regex that could take forever, and a command that is not there."""
        if not 0 < timeout < float("inf"):
            raise FormatError(f"--keep-timeout {timeout:g}: expected seconds above 0")
        if words is None:
            return cls(None, timeout)
        if not words.startswith(COMMAND):
            if not words:
                raise FormatError("--keep is empty: it would keep everything; leave it out for that")
            try:
                return cls(words, timeout, guarded(words, LONGEST, "--keep"))
            except FormatError as error:
                raise FormatError(str(error).replace("name the modules more simply", "write it more simply")) from None
        try:
            command = tuple(shlex.split(words.removeprefix(COMMAND)))
        except ValueError as error:
            raise FormatError(f"--keep {words!r}: not a command line ({error})") from None
        if not command or shutil.which(command[0]) is None:
            what = repr(command[0]) if command else "nothing"
            raise FormatError(f"--keep {words!r}: {what} cannot be run; give a program's name or path after {COMMAND}")
        return cls(words, timeout, None, command)

    def judge(self, text: str, line: str) -> str:
        """ "kept", "dropped" or "timed_out" for a completion; line: its prompt as it stands in the file."""
        if self.regex is not None:
            return "kept" if self.regex.search(text) else "dropped"
        return self._ask(text, line) if self.command else "kept"

    def _ask(self, text: str, line: str) -> str:
        around = {k: v for k, v in os.environ.items() if k != PROMPT}
        if len(line.encode()) <= _MOST and "\0" not in line:
            around[PROMPT] = line
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, env=around, start_new_session=True
        )
        try:
            process.communicate(text.encode("utf-8", "replace"), timeout=self.timeout)
        except subprocess.TimeoutExpired:
            return "timed_out"
        finally:
            if process.poll() is None:  # it and what it started; on an interrupt as well
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        return "kept" if process.returncode == 0 else "dropped"
