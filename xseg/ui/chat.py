"""``xseg chat``: talk about one image in the terminal; masks come out as files and as coverage per phrase."""

import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from xseg.errors import UserError, did_you_mean
from xseg.infer import request
from xseg.infer.predictor import opened
from xseg.infer.session import Answer, Session
from xseg.paths import check_folder, file_name, make_folder, writing_to
from xseg.ui.draw import overlay
from xseg.ui.loading import open_model

COMMANDS = {
    "/image": "FILE   talk about another image",
    "/undo": "        forget the last question and its answer",
    "/save": "[DIR]   write the conversation with its masks as JSON",
    "/help": "        show this",
    "/quit": "        leave (or Ctrl-D)",
}


def chat(model: Path, image: Path | None, say: list[str], out: Path, console: Console) -> None:
    """Hold a conversation: scripted by ``say``, or typed. UserError for a bad model, image, script or ``out``."""
    check_folder(out)
    if image is not None:
        opened(image)  # a bad file is told before the model is loaded
    terminal = Chat(Session(open_model(model, console)), out, console)
    if image is not None:
        terminal.open(image)
    if say:
        terminal.run(say)
        return
    console.print("A message names a thing or asks a question; /help explains.", style="dim")
    terminal.run(typed(console), forgiving=True)


def typed(console: Console) -> Iterator[str]:
    """Lines from the keyboard until the end of input; of what is no UTF-8 the session says so."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            yield console.input("[bold cyan]you[/] ")
        except EOFError:
            console.print()
            return


def printable(text: str) -> str:
    """What a model writes and what names of files hold may be anything, terminal control codes included."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


class Chat:
    """The terminal around a session: commands, answers, files in ``out``."""

    def __init__(self, session: Session, out: Path, console: Console) -> None:
        self.session, self.out, self.console = session, out, console
        """Number of answers written so far; names the files, also after /undo and /image."""

    def run(self, lines: Iterable[str], *, forgiving: bool = False) -> None:
        """Take lines until they end or one is /quit; ``forgiving`` shows a UserError and goes on."""
        for line in lines:
            if not line.strip():
                continue
            try:
                if not self.take(line.strip()):
                    return
            except UserError as error:
                if not forgiving:
                    raise
                self.console.print(Text(printable(str(error)), style="red"))

    def take(self, line: str) -> bool:
        """Do what one line says; False = leave."""
        if not line.startswith("/"):
            self._show(self.session.ask(line), line)
            return True
        command, _, argument = line.partition(" ")
        if command not in COMMANDS:
            raise UserError(f"{command}: no such command{did_you_mean(command, COMMANDS)}")
        if command == "/image":
            self.open(Path(argument.strip()))
        elif command == "/undo":
            self.console.print("forgotten" if self.session.undo() else "there is nothing to undo", style="dim")
        elif command == "/save":
            path = self.session.save(Path(argument.strip()) if argument.strip() else self.out)
            self.console.print(Text(printable(f"saved {path}"), style="dim"))
        elif command == "/help":
            lines = [request.HELP, "", *(f"{name:7}{what}" for name, what in COMMANDS.items())]
            self.console.print(Text("\n".join(lines)))
        return command != "/quit"

    def open(self, image: Path) -> None:
        """Start over with an image."""
        self.session.set_image(image)
        assert self.session.image is not None
        width, height = self.session.image.size
        self.console.print(Text(printable(f"{image}: {width} x {height} pixels"), style="dim"))

    def _show(self, answer: Answer, line: str) -> None:
        self.console.print(Text.assemble(("you  ", "bold cyan"), line) if not self.console.is_interactive else "")
        self.console.print(Text.assemble(("xseg ", "bold green"), printable(answer.text) or "(nothing)"))
        if request.read(line).phrases and not answer.segments:
            self.console.print(Text("     the answer holds no single <SEG>, so there is no mask", style="yellow"))
        for segment, coverage in zip(answer.segments, answer.coverage, strict=True):
            where = f"{coverage:.1f}% of the image (score {segment.score:.2f})" if coverage else "not in the image"
            self.console.print(Text.assemble("     ", (segment.label, "bold"), f": {where}"))
        if answer.segments:
            for path in self.write(answer):
                self.console.print(Text(printable(f"     {path}"), style="dim"), soft_wrap=True)

    def write(self, answer: Answer) -> tuple[Path, Path]:
        """Write the picture with its masks and the RLEs of one answer; each file appears complete or not at all."""
        assert self.session.image is not None
        make_folder(self.out)
        numbers = (f"{file_name(self.session.name)}-{n:02d}" for n in itertools.count(1))
        taken = {path.name for path in self.out.iterdir()}
        stem = next(stem for stem in numbers if not {f"{stem}.png", f"{stem}.json"} & taken)
        picture, masks = self.out / f"{stem}.png", self.out / f"{stem}.json"
        partial = self.out / f"{stem}.partial"
        with writing_to(self.out):
            overlay(self.session.image, answer.segments).save(partial, format="PNG")
            os.replace(partial, picture)
            partial.write_text(json.dumps(answer.as_json(), indent=1) + "\n", encoding="utf8")
            os.replace(partial, masks)
        return picture, masks
