"""`knn-ssd chat`: a conversation in the terminal, or with lines from a pipe."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from knn_ssd.cli import options, output, results
from knn_ssd.cli.line_editor import LineEditor
from knn_ssd.cli.options import option
from knn_ssd.errors import PromptError, UsageError

if TYPE_CHECKING:
    from knn_ssd.engine import Engine
    from knn_ssd.outputs import Generation

_COMMANDS = {
    "/stats": "statistics of the last answer and of all answers",
    "/system": "show the system message, or set it to the text that follows",
    "/reset": "forget the conversation",
    "/help": "these lines",
    "/quit": "leave (so does Ctrl-D)",
}
_COMMAND = re.compile(r"/[a-z]+")
_SYSTEM = re.compile(r"/system\s+(.+)", re.DOTALL)


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "chat",
        description="Chats with a model in the terminal. Ctrl-C stops an answer, Ctrl-D leaves, /help shows more.",
    )
    option(parser, "--system", "TEXT", "the system message, which says how to answer", options.filled)
    text = "do not keep what is typed for the line editor of later sessions (it is kept in the cache directory)"
    parser.add_argument("--no-history", action="store_true", help=text)
    options.add_model_options(parser)
    options.add_answers_options(options.add_atlas_options(parser))
    options.add_prefix_option(parser)
    options.add_sampling_options(parser, max_new_tokens=1024)


def run(args: argparse.Namespace) -> int:
    """Chats until the user leaves."""
    atlas = options.read_atlas(args)
    options.check_answers(args)
    stream_options = options.sampling(args)
    engine = options.load_engine(args, atlas)
    if engine.tokenizer is None or not engine.tokenizer.chat_template:
        raise UsageError("the model has no chat template, so it cannot converse", "Use `knn-ssd generate`.")
    options.prepare_later(engine)
    conversation = Conversation(engine, stream_options)
    if args.system is not None:
        conversation.set_system(args.system)
    if sys.stdin.isatty():
        _greet(engine)
    editor = LineEditor(keeps_history=not args.no_history)
    while (line := editor.read()) is not None:
        text = line.strip()
        if text == "/quit":
            break
        if system := _SYSTEM.fullmatch(text):
            _change_system(system[1], conversation)
        elif _COMMAND.fullmatch(text):
            _run_command(text, conversation)
        elif text:
            _reply(conversation, text)
    return 0


@dataclass(slots=True)
class Conversation:
    """The messages that fit the model's context, and the finished answers.

    Args:
        engine: generates the answers.
        stream_options: options of `Engine.stream`.

    Attributes:
        system: the system message, which stays when others are dropped; None without one.
    """

    engine: Engine
    stream_options: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)
    answers: list[Generation] = field(default_factory=list)
    system: str | None = None

    def add(self, role: str, text: str) -> None:
        self.messages.append({"role": role, "content": text})

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The system message, if there is one, and the messages."""
        return self._with_system(self.messages)

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]

    def set_system(self, text: str) -> None:
        """Sets the system message.

        Raises:
            PromptError: the model's chat template takes none, or it is too long; the one before stays.
        """
        before, self.system = self.system, text
        try:
            self.engine.encode(self._with_system([{"role": "user", "content": "?"}]))
        except PromptError:
            self.system = before
            raise

    def fit(self) -> int:
        """Drops the oldest turns until there is room for an answer, and returns how many.

        Raises:
            PromptError: the last message alone is too long; nothing is dropped.
        """
        self.engine.encode(self._with_system(self.messages[-1:]))
        dropped = 0
        while len(self.messages) > 1 and not self._has_room():
            del self.messages[:2]  # a message of the user and its answer
            dropped += 1
        return dropped

    def _has_room(self) -> bool:
        context_length = self.engine.backend.context_length
        room = min(self.stream_options["max_new_tokens"], context_length // 4)
        try:
            return bool(len(self.engine.encode(self.prompt)) + room <= context_length)
        except PromptError:  # longer than the context
            return False


def _reply(conversation: Conversation, text: str) -> None:
    """Answers one message. The part of an answer that came before Ctrl-C stays in the conversation."""
    conversation.add("user", text)
    try:
        options.check_text(text)
        dropped = conversation.fit()
    except PromptError as error:
        conversation.messages.pop()
        output.note(f"({error})")
        return
    if dropped:
        turns = "turn was" if dropped == 1 else f"{dropped} turns were"
        output.note(f"(the conversation has outgrown the model's context: its oldest {turns} dropped)")
    answer, is_whole = _stream_answer(conversation)
    if answer or is_whole:
        conversation.add("assistant", answer)
    else:
        conversation.messages.pop()


def _stream_answer(conversation: Conversation) -> tuple[str, bool]:
    """Shows the answer as it is generated, and returns it and whether it is complete."""
    pieces: list[str] = []
    try:
        with closing(conversation.engine.stream(conversation.prompt, **conversation.stream_options)) as stream:
            for chunk in stream:
                pieces.append(chunk.text)
                output.write(chunk.text)
            conversation.answers.append(stream.result)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        output.note(" (stopped)")
        return "".join(pieces), False
    output.write("\n")
    return "".join(pieces), True


def _change_system(text: str, conversation: Conversation) -> None:
    try:
        conversation.set_system(text)
    except PromptError as error:
        output.note(f"({error})")
    else:
        output.note("(the system message is set)")


def _run_command(command: str, conversation: Conversation) -> None:
    if command == "/reset":
        conversation.messages.clear()
        output.note("(the conversation is forgotten)")
    elif command == "/system":
        output.note("(there is no system message)" if conversation.system is None else conversation.system)
    elif command == "/stats":
        _show_stats(conversation.answers)
    else:
        if command != "/help":
            output.note(f"There is no {command}. There are:")
        for name, line in _COMMANDS.items():
            output.note(f"  {name:8} {line}")


def _show_stats(answers: list[Generation]) -> None:
    if not answers:
        output.note("(no answer is finished yet)")
        return
    output.note(results.summary(answers[-1]))
    output.note(results.total([answer.stats for answer in answers]))
    output.note(results.memory(answers[-1].stats.memory))


def _greet(engine: Engine) -> None:
    atlas = engine.atlas
    drafts = "no atlas: the general plan" if atlas is None else f"atlas of {', '.join(sorted(atlas.domains))}"
    from knn_ssd.kernels.gguf_rows import dtype_name

    output.note(
        f"[{type(engine.model).__name__} in {dtype_name(engine.model)} | {engine.exactness.value} exactness | {drafts}]"
    )
    output.note("Ctrl-C stops an answer, Ctrl-D leaves, /help shows more.")
