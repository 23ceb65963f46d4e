"""A chat template as one job uses it: which text it is, how it renders a conversation, and what it writes around an answer.

    settings = chat_settings(job)                        # train_on, chat_template and chat_template_kwargs of the config
    template = ChatTemplate(tokenizer, settings)
    text = template.render(messages, tools, kwargs, where)

`Borders` are what a template writes where an assistant starts to speak (its generation prompt) and where it ends.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_lora.config.schema import JobConfig
from megatron_lora.data.named_templates import NAMED_TEMPLATES
from megatron_lora.data.render_bounds import MOST_CHARACTERS, bounded
from megatron_lora.errors import UserError, one_line
from megatron_lora.files import read_regular

Message = Mapping[str, Any]
# The date given to templates that print today's: equal records must give equal tokens on any day. Llama's templates default to it.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
# Templates call strftime_now(format). Transformers passes them data, not functions, so ours is a macro (whose newline jinja trims).
STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{% set date = format"
    + "".join(
        f" | replace('%{code}', '{TEMPLATE_DATE.strftime('%' + code)}')" for code in (*"aAbBdeDFHIjmMpRSTyYZ", "-d", "-m", "-H", "-I")
    )
    + " %}{% if '%' in date %}{{ raise_exception('it asks for the date as ' + format + ', which is not supported') }}{% endif %}"
    + "{{ date }}{% endmacro %}\n"
)
# What a template is given besides kwargs, or transformers takes as its own option: no kwargs of a job or a record.
GIVEN_TO_TEMPLATES = frozenset(
    ("messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message")
    + ("return_assistant_tokens_mask",)
)
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What a job's config says about conversations: the text of its own template, its kwargs as JSON, and which turns are trained."""

    template: str | None = None
    kwargs: str = "{}"
    train_on: str = "all"


@dataclass(frozen=True, slots=True)
class Borders:
    """What a template writes around an answer; each is empty where it writes nothing, or refuses the smallest conversation.

    `opening` asks for an answer, up to a thought that it opens (`opens_thought`). `lead` follows it, before the answer's text, and
    is the model's to write. `closing` ends the answer.
    """

    opening: str = ""
    opens_thought: bool = False
    lead: str = ""
    closing: str = ""


class Span(NamedTuple):
    """Characters `start` to `end` of a turn; `closed`: its end is in them."""

    start: int
    end: int
    closed: bool = False


def chat_settings(job: JobConfig) -> ChatSettings:
    """Return a job's settings, with the text of its template; UserError for a file that cannot be read."""
    name, kwargs = job.chat_template, json.dumps(job.chat_template_kwargs or {}, sort_keys=True)
    if name is None or name in NAMED_TEMPLATES:
        return ChatSettings(NAMED_TEMPLATES.get(name or ""), kwargs, job.train_on)
    try:
        text = read_regular(Path(name)).decode()
        reason = "" if text.strip() else "it is empty"
    except (OSError, UnicodeDecodeError) as error:
        text, reason = "", str(error.strerror) if isinstance(error, OSError) else "it is not UTF-8 text"
    if reason:
        raise UserError(
            f"jobs.{job.name}.chat_template: {name!r} cannot be read ({reason}); name a file that holds a template, or one of "
            f"{', '.join(NAMED_TEMPLATES)}"
        )
    return ChatSettings(text, kwargs, job.train_on)


class ChatTemplate:
    """The chat template of a tokenizer, or the one that a job names in its place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings):
        self._tokenizer = tokenizer
        self._own = settings.template
        self._kwargs: dict[str, Any] = json.loads(settings.kwargs)
        self._borders: dict[str, Borders] = {}
        self._beyond_bounds = ""

    def text(self, tools: Sequence[Any] | None = None) -> str:
        """Return the template's text; ValueError when there is none, or several of which none is the default."""
        template = self._own or cast(str, self._tokenizer.get_chat_template(tools=cast(list, tools)))
        return STRFTIME_NOW + template if "strftime_now" in template else template

    def unknown(self, kwargs: Mapping[str, Any] | None = None) -> list[str]:
        """List the kwargs, by default the job's, that the template does not name."""
        text = self.text()
        return [name for name in (self._kwargs if kwargs is None else kwargs) if not re.search(rf"\b{re.escape(name)}\b", text)]

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, kwargs: Mapping[str, Any], where: str, prompt: bool = False
    ) -> str:
        """Render a conversation, with `prompt` up to where an assistant answers it; UserError when the template refuses it."""
        return self._render(messages, tools, kwargs, where, add_generation_prompt=prompt)[0]

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, kwargs: Mapping[str, Any], where: str
    ) -> tuple[str, list[Span] | None]:
        """Render a conversation, with what each of the template's generation marks holds; None where the template has no marks."""
        if not GENERATION_MARK.search(self.text(tools)):
            return self.render(messages, tools, kwargs, where), None
        return self._render(messages, tools, kwargs, where, return_assistant_tokens_mask=True)

    def _render(self, messages, tools, kwargs, where: str, **options) -> tuple[str, list[Span]]:
        try:
            if self._beyond_bounds:
                raise TimeoutError(self._beyond_bounds)
            with bounded():
                texts, marks = render_jinja_template(
                    conversations=[[dict(message) for message in messages]],
                    tools=tools,
                    chat_template=self.text(tools),
                    **options,
                    **{**self._tokenizer.special_tokens_map, **self._kwargs, **kwargs},
                )
            if len(texts[0]) > MOST_CHARACTERS:
                raise MemoryError(f"it writes {len(texts[0]):,} characters")
        except Exception as error:  # the template is the model's own program: whatever it raises, it refuses this record
            reason = one_line(str(error).strip().rstrip(".") or type(error).__name__, 200)
            if isinstance(error, TimeoutError | MemoryError):  # then no other record costs as much
                self._beyond_bounds = reason
                reason = f"it goes beyond the bounds of a template ({reason})"
            if isinstance(error, TemplateSyntaxError):
                line = error.lineno - self.text(tools).startswith(STRFTIME_NOW)
                raise UserError(f"{where}: the chat template cannot be read ({reason} in its line {line}); correct it") from None
            roles = ", ".join(message["role"] for message in messages[:6]) + (", ..." if len(messages) > 6 else "")
            raise UserError(
                f"{where}: the chat template refuses this conversation of {roles}: {reason}; change the record, or the template"
            ) from None
        return texts[0], [Span(int(start), int(end), closed=True) for start, end in (marks[0] if marks else [])]

    def borders(self, kwargs: Mapping[str, Any]) -> Borders:
        """Return what the template writes around an answer, found with one question and one answer."""
        key = json.dumps(kwargs, sort_keys=True, default=str)
        if key not in self._borders:
            self._borders[key] = self._find_borders(kwargs)
        return self._borders[key]

    def _find_borders(self, kwargs: Mapping[str, Any]) -> Borders:
        question, answer = {"role": "user", "content": "question"}, "answer0x"
        try:
            asked = self.render([question], None, kwargs, "")
            prompt = self.render([question], None, kwargs, "", prompt=True)
            before, _, after = self.render([question, {"role": "assistant", "content": answer}], None, kwargs, "").partition(answer)
        except UserError:  # it wants other roles, or tools
            return Borders()
        opening, thought, rest = prompt.removeprefix(asked).partition("<think>") if prompt.startswith(asked) else ("", "", "")
        opens_thought = bool(thought) and not rest.strip()
        lead = before.removeprefix(asked + opening)
        if not before.startswith(asked + opening) or "<think>" in lead or (lead.strip() and not opening):
            lead = ""  # the head of a turn, or an empty thought
        return Borders(opening, opens_thought, lead, self._end_mark(after))

    def _end_mark(self, closing: str) -> str:
        """Return the added tokens that end an answer or, without any, the first line with something in it."""
        head = closing[: len(closing) - len(closing.lstrip())]
        bos, eos = cast(str, self._tokenizer.bos_token), cast(str, self._tokenizer.eos_token)
        added = {str(token) for token in self._tokenizer.added_tokens_decoder.values()} | {eos}
        added -= {bos} - {eos}  # of the next sample
        tokens = re.match("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)), closing.strip())
        mark = ""
        while tokens:
            mark += tokens.group()
            tokens = re.match(tokens.re, closing.strip()[len(mark) :])
        if not mark:
            mark = closing.strip().partition("\n")[0].partition(bos if bos and bos != eos else "\n")[0].rstrip()
        return head + mark if mark else ""
