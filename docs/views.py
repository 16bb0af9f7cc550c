"""Draws the pictures of the pages: what the command shows of a run, and the page of `report`.

`make views` trains a small run on two ranks, damages one of its checkpoints, and calls each verb on
a terminal of 80 columns; needs a Chromium on PATH for the picture of `report`.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

PLACE = Path(__file__).parent / "how-to" / "images"
TRAIN = Path(__file__).parents[1] / "examples" / "train.py"
COLUMNS = 80
RUN = "--save runs/a --load runs/a --save_interval 10 --max_checkpoint_keep 4"
LEGS = (
    f"--num_iteration 40 --tensor_parallel 2 {RUN}",
    f"--num_iteration 60 --data_parallel fsdp {RUN}",
)
VIEWS = {
    "ls": "ls --all runs/a",
    "watch": "watch runs/a",
    "verify": "verify runs/a --step all",
    "inspect": "inspect runs/a --depth 2",
    "diff": "diff runs/a runs/a --step 40 --other-step 60",
    "plan": "plan runs/a --to tp=2,dp_shard=2",
    "prune": "prune runs/a --keep-last 2 --keep-best loss:min:2",
    "doctor": "doctor runs/a --size 40GiB --keep 3",
}
REPORT = "report runs/a --output report.html --png report.png --keep-last 2 --mtbf 8h"


def main() -> None:
    """Draw every picture anew."""
    command = (sys.executable, "-m", "dcp_resume")
    with tempfile.TemporaryDirectory(prefix="dcp-resume-") as scratch:
        os.chdir(scratch)
        for leg in LEGS:
            ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
            subprocess.run([sys.executable, *ranks, str(TRAIN), *leg.split()], check=True)
        subprocess.run([*command, *REPORT.split()], check=True)
        (PLACE / "report.png").write_bytes(Path("report.png").read_bytes())
        damage(next(Path("runs/a/step-00000050").rglob("*model*.safetensors")))
        for name, call in VIEWS.items():
            shown = on_terminal([*command, *shlex.split(call)])
            (PLACE / f"{name}.svg").write_text(svg(name, call, shown), encoding="utf-8")


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def on_terminal(command: list[str]) -> str:
    """What a command writes to a terminal; one that follows is interrupted at its status line."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, COLUMNS, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**kept, "TERM": "xterm-256color"},
    ) as process:
        os.close(theirs)
        shown = b""
        for piece in pieces(ours):
            shown += piece
            if b" old" in shown:
                process.send_signal(signal.SIGINT)
                break
        for _ in pieces(ours):
            pass  # what it says on being interrupted is not drawn
    os.close(ours)
    return shown.decode()


def pieces(terminal: int) -> Iterator[bytes]:
    """Reads until the other side is closed, which a terminal reports as an error."""
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:
            return
        yield piece


def svg(name: str, call: str, shown: str) -> str:
    """The last state of each line, as a picture that fetches no font."""
    console = Console(record=True, width=COLUMNS, force_terminal=True, file=io.StringIO())
    console.print(Text(f"$ dcp-resume {call}", style="dim"))
    for line in last_state(shown):
        console.print(Text.from_ansi(line))
    drawn = console.export_svg(title="", unique_id=name)
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"<circle[^>]*/>", "", drawn)
    drawn = drawn.replace("Fira Code, monospace", "monospace")
    return "\n".join(line.rstrip() for line in drawn.splitlines() if line.strip()) + "\n"


def last_state(shown: str) -> list[str]:
    """Lines as they stand in the end, where each was written again after a carriage return."""
    shown = re.sub(r"\x1b\[\?25[lh]", "", shown).replace("\r\n", "\n")
    lines = [""]
    for token in re.split(r"(\n|\r|\x1b\[1A|\x1b\[2?K)", shown):
        if token == "\n":
            lines.append("")
        elif token == "\x1b[1A":
            lines.pop()
        elif token in {"\r", "\x1b[2K"}:
            lines[-1] = ""
        elif token != "\x1b[K":
            lines[-1] += token
    return lines


if __name__ == "__main__":
    main()
