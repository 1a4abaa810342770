"""``xseg chat``: talk about one image in the terminal; masks come out as files and as coverage per phrase."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from xseg.errors import UserError, did_you_mean
from xseg.infer import request
from xseg.infer.predictor import opened
from xseg.infer.session import Answer, Session
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
    """Hold a conversation: scripted by ``say``, or typed. Raises UserError for a bad model, image or script."""
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
    """Lines from the keyboard until the end of input."""
    while True:
        try:
            yield console.input("[bold cyan]you[/] ")
        except EOFError:
            console.print()
            return


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
                self.console.print(Text(str(error), style="red"))

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
            self.console.print(Text(f"saved {path}", style="dim"))
        elif command == "/help":
            lines = [request.HELP, "", *(f"{name:7}{what}" for name, what in COMMANDS.items())]
            self.console.print(Text("\n".join(lines)))
        return command != "/quit"

    def open(self, image: Path) -> None:
        """Start over with an image."""
        self.session.set_image(image)
        assert self.session.image is not None
        width, height = self.session.image.size
        self.console.print(Text(f"{image}: {width} x {height} pixels", style="dim"))

    def _show(self, answer: Answer, line: str) -> None:
        self.console.print(Text.assemble(("you  ", "bold cyan"), line) if not self.console.is_interactive else "")
        # a model may write anything, terminal control codes included
        said = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in answer.text)
        self.console.print(Text.assemble(("xseg ", "bold green"), said or "(nothing)"))
        if request.read(line).phrases and not answer.segments:
            self.console.print(Text("     the answer holds no single <SEG>, so there is no mask", style="yellow"))
        for segment, coverage in zip(answer.segments, answer.coverage, strict=True):
            where = f"{coverage:.1f}% of the image (score {segment.score:.2f})" if coverage else "not in the image"
            self.console.print(Text.assemble("     ", (segment.label, "bold"), f": {where}"))
        if answer.segments:
            for path in self.write(answer):
                self.console.print(Text(f"     {path}", style="dim"), soft_wrap=True)

    def write(self, answer: Answer) -> tuple[Path, Path]:
        """Write the picture with its masks and the RLEs of one answer; each file appears complete or not at all."""
        assert self.session.image is not None
        self.out.mkdir(parents=True, exist_ok=True)
        numbers = (f"{self.session.name}-{n:02d}" for n in itertools.count(1))
        stem = next(stem for stem in numbers if not (self.out / f"{stem}.png").exists())
        picture, masks = self.out / f"{stem}.png", self.out / f"{stem}.json"
        partial = self.out / f"{stem}.partial"
        overlay(self.session.image, answer.segments).save(partial, format="PNG")
        os.replace(partial, picture)
        partial.write_text(json.dumps(answer.as_json(), indent=1) + "\n", encoding="utf8")
        os.replace(partial, masks)
        return picture, masks
