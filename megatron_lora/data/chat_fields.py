"""The fields of a conversation's record and turns: each is used, refused by name, or harmless; any other is named in a note.

    messages         a list of turns, under `messages` or `conversations`; each {role, content} or {from, value}
    prompt           with `completion`, both lists of turns: only the completion's are trained
    system, tools    what the conversation begins with; `functions` are tools
    tool_calls, reasoning_content, name, tool_call_id, chat_template_kwargs    given to the chat template

A turn is not trained where it is marked so: by `weight` 0 or another name of the same mark (MARKS).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron_lora.data.chat_template import GIVEN_TO_TEMPLATES
from megatron_lora.data.record_fields import HARMLESS, MEDIA, SAYS_NOTHING, check_other_fields, is_mark, missing, text_of, unused
from megatron_lora.errors import UserError

CHAT_TYPES = ("messages", "sharegpt")
LISTS = MappingProxyType({"messages": ("messages", "conversations"), "sharegpt": ("conversations", "messages")})
ROLES = MappingProxyType(
    {role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")}
    | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
    | {"observation": "tool", "tool_response": "tool", "function_response": "tool"}
    | {"function_call": "assistant", "tool_call": "assistant"}
)
CALLS = ("function_call", "tool_call")  # roles whose text is a call, or a list of calls, as JSON
# What trainers call the mark of a turn that is trained or not, and the one that means the opposite.
MARKS = (
    *("weight", "train", "loss", "training", "trainable", "train_on_turn", "train_on_assistant"),
    *("loss_mask", "step_loss_mask", "loss_weight", "loss_scale"),
)
OPPOSITE_MARK = "masked"
ALL_MARKS = frozenset((*MARKS, OPPOSITE_MARK))
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what a turn's thoughts are called; transformers knows the same names
# Fields of a record that a conversation uses, besides those that hold its turns.
USED_IN_RECORD = frozenset(("system", "system_prompt", "tools", "functions", "chat_template_kwargs", "enable_thinking", "loss_mask"))
USED_IN_TURN = frozenset(("tool_calls", "function_call", "name", "tool_call_id", *THOUGHTS, *ALL_MARKS))
USED_IN_CALL = frozenset(("id", "type", "index", "function", "name", "arguments", "parameters"))  # of either form
REFUSED_IN_TURN = ("refusal", *MEDIA)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A record as chat templates take it: messages, tools, kwargs; which messages are `trained`, which are marked untrained; notes."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    kwargs: dict[str, Any]
    trained: list[bool]
    untrained: list[bool]
    notes: tuple[str, ...]


def is_conversation(record: Mapping[str, object], format: str) -> bool:
    """Whether a record of a format is a conversation: always in CHAT_TYPES, and prompt_completion with lists of turns."""
    return format in CHAT_TYPES or (format == "prompt_completion" and isinstance(record.get("prompt"), list))


def read_conversation(record: Mapping[str, object], format: str, train_on: str, where: str) -> Conversation:
    """Read every field of a record; UserError for one that is refused."""
    turns, num_prompt, used = _turns_of(record, format, where)
    notes: dict[str, None] = {}
    messages = [_message(turn, where, notes) for turn in turns]
    marks = [_mark(turn, where) for turn in turns]
    marks = _marks_of_record(record, marks, where)
    system = _system(record, messages, where)
    if system is not None:
        messages, marks, num_prompt = [system, *messages], [None, *marks], num_prompt and num_prompt + 1
    notes |= dict.fromkeys(check_other_fields(record, used | USED_IN_RECORD, where))
    speaks = [message["role"] == "assistant" for message in messages]
    for index, (message, mark) in enumerate(zip(messages, marks, strict=True)):
        if mark is True and (message["role"] != "assistant" or index < num_prompt):
            of = "a prompt" if index < num_prompt else message["role"]
            notes[f"turns of {of} are marked to be trained and never are"] = None
    trained = [s and mark is not False and index >= num_prompt for index, (s, mark) in enumerate(zip(speaks, marks, strict=True))]
    if train_on == "last":
        last = max((index for index, s in enumerate(speaks) if s), default=-1)
        trained = [t and index == last for index, t in enumerate(trained)]
    return Conversation(messages, _tools(record, where), _kwargs(record, where), trained, [mark is False for mark in marks], tuple(notes))


def _turns_of(record: Mapping[str, object], format: str, where: str) -> tuple[list[Mapping[str, Any]], int, set[str]]:
    """Get a record's turns, how many of them are a prompt, and the fields that they stand in."""
    first, second = LISTS.get(format, ("", ""))
    key = next((name for name in (first, second) if name and _is_set(record.get(name))), "")
    if key:
        return _list_of_turns(record, key, where), 0, {key}
    if isinstance(record.get("prompt"), list):
        prompt = _list_of_turns(record, "prompt", where)
        return [*prompt, *_list_of_turns(record, "completion", where)], len(prompt), {"prompt", "completion"}
    if first in record and record[first] is not None:
        raise UserError(f"{where}: {first!r} is empty; remove the record or complete it")
    raise missing(record, first, where)


def _list_of_turns(record: Mapping[str, object], key: str, where: str) -> list[Mapping[str, Any]]:
    turns = record.get(key)
    if turns is None:
        raise missing(record, key, where)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: {key!r} is {json.dumps(turns, default=str)[:40]}; write a list of turns")
    if not turns:
        raise UserError(f"{where}: {key!r} is empty; remove the record or complete it")
    return turns


def _message(turn: Mapping[str, Any], where: str, notes: dict[str, None]) -> dict[str, Any]:
    """Return a turn as the message that chat templates know."""
    role_key = "role" if turn.get("role") is not None or turn.get("from") is None else "from"
    content_key = "content" if turn.get("content") is not None or turn.get("value") is None else "value"
    speaker = text_of(turn, role_key, where)
    if speaker not in ROLES:
        raise UserError(f"{where}: {role_key!r} is {speaker!r}; use one of {', '.join(ROLES)}")
    role = ROLES[speaker]
    if len(turn) == 2 and isinstance(turn.get(content_key), str) and speaker not in CALLS:  # as most turns are
        return {"role": role, "content": text_of(turn, content_key, where)}
    message: dict[str, Any] = {"role": role}
    calls: list[dict[str, Any]] = []
    for key in ("tool_calls", "function_call"):
        if _is_set(turn.get(key)):
            calls += _parsed_calls(_json_of(turn[key], repr(key), where), where, notes)
    if speaker in CALLS:
        calls += _parsed_calls(_json_of(text_of(turn, content_key, where), "the turn of a call", where), where, notes)
        message["content"] = ""
    else:
        message["content"] = "" if calls and turn.get(content_key) is None else _content(turn, content_key, where, notes)
    if calls:
        message["tool_calls"] = calls
    thoughts = [name for name in THOUGHTS if _is_set(turn.get(name))]
    if thoughts:
        message["reasoning_content"] = message["thinking"] = text_of(turn, thoughts[0], where)
        if any(turn[name] != turn[thoughts[0]] for name in thoughts):
            raise UserError(f"{where}: {' and '.join(map(repr, thoughts))} of a turn are two thoughts; keep one of them")
        if "</think>" in message["content"]:
            raise UserError(f"{where}: a turn has a thought in {thoughts[0]!r} and one in its text, up to </think>; keep one of them")
    message |= {name: turn[name] for name in ("name", "tool_call_id") if _is_set(turn.get(name))}
    if role != "assistant" and (calls or thoughts):
        what = "tool_calls" if calls else repr(thoughts[0])
        raise UserError(f"{where}: {what} of a turn of {role!r}; only the assistant's turns have them")
    for name, value in turn.items():
        if name in REFUSED_IN_TURN and _is_set(value):
            raise UserError(f"{where}: {name!r} of a turn is not supported; remove it, or write what it says into the turn's text")
    _note_others(turn, "turn", {role_key, content_key, *USED_IN_TURN}, where, notes)
    return message


def _content(turn: Mapping[str, Any], key: str, where: str, notes: dict[str, None]) -> str:
    """Get a turn's text, which may stand in parts."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return text_of(turn, key, where)
    texts = []
    for part in parts:
        kind = part.get("type", "text" if "text" in part else "") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise UserError(f"{where}: {key!r} has a part of type {kind!r}; write text, or parts of type 'text' alone")
        part = part if isinstance(part, dict) else {"text": part}
        texts.append(text_of(part, "text", where))
        _note_others(part, "part", ("type", "text"), where, notes)
    return "".join(texts)


def _parsed_calls(calls: Any, where: str, notes: dict[str, None]) -> list[dict[str, Any]]:
    """Return calls as {type, function: {name, arguments}}, with arguments that are JSON text as what they say, as servers give them."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = _json_of(call, "a call", where)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a call is {json.dumps(call, default=str)[:40]}; write {{name, arguments}}")
        _note_others(call, "call", USED_IN_CALL, where, notes)
        arguments_key = "arguments" if _is_set(function.get("arguments")) else "parameters"
        if function is not call:
            _note_others(function, "call", ("name", arguments_key), where, notes)
        arguments = function.get(arguments_key, {})
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        function = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        found.append({**({"id": call["id"]} if _is_set(call.get("id")) else {}), "type": "function", "function": function})
    return found


def _mark(turn: Mapping[str, Any], where: str) -> bool | None:
    """Return whether a turn is marked to be trained; None without a mark."""
    marks = {}
    for name, value in turn.items():
        if value is not None and name in ALL_MARKS:
            marks[name] = _truth(value, name, where) != (name == OPPOSITE_MARK)
    if len(set(marks.values())) > 1:
        raise UserError(f"{where}: {' and '.join(map(repr, marks))} of a turn contradict each other; keep one of them")
    return next(iter(marks.values()), None)


def _truth(value: Any, name: str, where: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise UserError(f"{where}: {name!r} of a turn is {json.dumps(value, default=str)[:40]}; use 0 or 1, or false or true")


def _marks_of_record(record: Mapping[str, object], marks: list[bool | None], where: str) -> list[bool | None]:
    """Join the marks of turns with a record's `loss_mask`, which has one for each turn."""
    mask = record.get("loss_mask")
    if not _is_set(mask):
        return marks
    if not isinstance(mask, list) or len(mask) != len(marks):
        raise UserError(f"{where}: 'loss_mask' is not a list with one mark for each of the {len(marks)} turns; use 0 or 1 for each")
    return [False if mark is False else _truth(value, "loss_mask", where) for mark, value in zip(marks, mask, strict=True)]


def _system(record: Mapping[str, object], messages: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any] | None:
    """Return the message that a record's system prompt adds; None where it adds none."""
    keys = [key for key in ("system", "system_prompt") if _is_set(record.get(key))]
    if not keys:
        return None
    prompts = {text_of(record, key, where) for key in keys}
    if messages[0]["role"] in ("system", "developer"):
        prompts.add(messages[0]["content"])
    if len(prompts) > 1:
        raise UserError(f"{where}: {keys[0]!r} is another system prompt than the record's other one; keep one of them")
    return None if messages[0]["role"] in ("system", "developer") else {"role": "system", "content": prompts.pop()}


def _tools(record: Mapping[str, object], where: str) -> list[Any] | None:
    """Return a record's tools as chat templates take them; None without any."""
    tools: list[Any] = []
    for key in ("tools", "functions"):
        if not _is_set(record.get(key)):
            continue
        found = _json_of(record[key], repr(key), where)
        for tool in found if isinstance(found, list) else [found]:
            tool = _json_of(tool, f"an entry of {key!r}", where)
            if not isinstance(tool, dict):
                raise UserError(f"{where}: {key!r} is {json.dumps(found, default=str)[:40]}; write a list of objects")
            tools.append(tool if key == "tools" else {"type": "function", "function": tool})
    return tools or None


def _kwargs(record: Mapping[str, object], where: str) -> dict[str, Any]:
    """Return what a record gives to the chat template besides its messages and tools."""
    kwargs = _json_of(record.get("chat_template_kwargs") or {}, "'chat_template_kwargs'", where)
    if not isinstance(kwargs, dict):
        raise UserError(f"{where}: 'chat_template_kwargs' is {json.dumps(kwargs, default=str)[:40]}; write an object")
    own = {"enable_thinking": record["enable_thinking"]} if record.get("enable_thinking") is not None else {}
    for name in kwargs.keys() & GIVEN_TO_TEMPLATES:
        raise UserError(f"{where}: {name!r} in 'chat_template_kwargs' is given to every template; remove it")
    return {**{name: value for name, value in kwargs.items() if value is not None}, **own}


def _json_of(value: Any, what: str, where: str) -> Any:
    """Return a value, or what it says where it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: {what} is {value[:40]!r}, which is not JSON; correct it") from None


def _is_set(value: object) -> bool:
    return value not in SAYS_NOTHING


def _note_others(fields: Mapping[str, Any], of: str, used: Collection[str], where: str, notes: dict[str, None]) -> None:
    """Note the fields of a part of a record that are not used; UserError for a mark, which says something about all of the turn."""
    for name, value in fields.items():
        if name in used or name.lower() in HARMLESS or not _is_set(value):
            continue
        if is_mark(name):
            raise UserError(f"{where}: {name!r} of a {of} is not supported; use 'weight', which is 0 or 1 for the complete turn")
        notes[unused(name, f" of a {of}")] = None
