"""A command run in a real terminal, and what stood on the screen at its end as SVG."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

_THEME = TerminalTheme(
    (30, 36, 44),
    (222, 228, 234),
    [(94, 104, 115), (232, 104, 104), (97, 201, 168), (232, 176, 96), (110, 168, 254), (198, 146, 233), (86, 194, 214)],
)
# Rich's own form, without the fonts that it loads from elsewhere: pages of GitHub load nothing.
_FORM = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"
height="{height}" role="img"><title>TITLE</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; white-space: pre }}
.{unique_id}-title {{ font-size: 18px; font-weight: 600; font-family: system-ui, sans-serif }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
_CODES = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\][^\x07]*\x07")


def recorded(command: list[str], columns: int) -> str:
    """The command of this Python's environment, its last screen, its colours."""
    text = played(run(command, columns))
    console = Console(width=columns, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), (" ".join(command), "bold")))
    console.print(Text.from_ansi(text.rstrip()), soft_wrap=False)
    title = " ".join(command)
    form = _FORM.replace("TITLE", title)
    return console.export_svg(title=title, theme=_THEME, code_format=form, unique_id="demo")


def run(command: list[str], columns: int) -> str:
    """All that it writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
    program = str(Path(sys.executable).with_name(command[0]))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen([program, *command[1:]], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = bytearray()
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # how Linux says that nobody writes any more
            break
        if not piece:
            break
        written += piece
    if process.wait():
        sys.exit(f"{' '.join(command)} failed:\n{written.decode(errors='replace')}")
    return written.decode(errors="replace")


def played(written: str) -> str:
    """The lines that are left of it: progress bars go up and write over themselves."""
    lines, row = [""], 0
    for piece in re.split(r"(\r\n|\n|\r|\x1b\[[0-9;?]*[A-Za-z])", written):
        code = _CODES.fullmatch(piece)
        if piece in ("\n", "\r\n"):
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif code and code[2] == "A":
            row = max(0, row - int(code[1] or 1))
        elif code and code[2] in "KJ":
            lines[row] = ""
        elif piece == "\r":
            continue
        elif not code or code[2] == "m":
            lines[row] += piece
    return "\n".join(lines)
