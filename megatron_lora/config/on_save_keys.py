"""What gets each finished adapter while a run trains: the keys of an entry of `on_save`, a server's address or a command.

on_save: {url: http://127.0.0.1:8000}                  or  [{url: ...}, {command: [python, scripts/publish.py]}]
"""

import dataclasses
from urllib.parse import urlsplit

from megatron_lora.config.keys import build, key
from megatron_lora.config.rules import accepts, list_of, null_or, number, show, text, truth, whole_number
from megatron_lora.errors import UserError


@accepts("a server's address, `http://host:port` or `https://...`")
def server_url(path: str, value: object) -> str:
    """Accept the address of a server, without what would be a secret in a file, or would lead elsewhere."""
    url = text("a server's address")(path, value)
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good, parts = False, urlsplit("")
    if not good or parts.username or parts.password or parts.query or parts.fragment or not url.isascii() or not url.isprintable():
        raise UserError(f"{path}: {show(value)} is no address of a server; use http://host:port, without a name, password or query")
    return url.rstrip("/")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OnSaveConfig:
    """Where finished adapters are announced: a server that loads LoRA adapters, or a command."""

    url: str | None = key(
        None,
        null_or(server_url),
        "each adapter is POSTed to its `/v1/load_lora_adapter` under the job's name; vLLM needs `--enable-lora` and "
        "`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`, and sees the directory under the same path",
    )
    command: tuple[str, ...] | None = key(
        None, null_or(list_of("words", text("a word"))), "or a program with its arguments; the directory is its last one. No shell"
    )
    load_inplace: bool = key(False, truth(), "true: an adapter of that name in the server is replaced; false: the server refuses it")
    timeout_s: float = key(60.0, number("a time in seconds", 0, 3600, above=True), "an attempt is given up after this", "seconds")
    attempts: int = key(3, whole_number("a number of attempts", 1, 10), "for each adapter, with growing pauses", "attempts")

    @property
    def name(self) -> str:
        """What messages and status.json call it."""
        return self.url or " ".join(self.command or ())


@accepts("a mapping of the keys below, or a list of such")
def on_save(path: str, value: object) -> tuple[OnSaveConfig, ...]:
    """Accept one entry or several, each with a url or a command."""
    if value is None or value == []:
        return ()
    if isinstance(value, list):
        return tuple(entry for position, each in enumerate(value) for entry in on_save(f"{path}.{position}", {} if each is None else each))
    entry = build(OnSaveConfig, path, value)
    if (entry.url is None) == (entry.command is None):
        raise UserError(f"{path}: {show(value)} names {'neither' if entry.url is None else 'both'} url and command; set one of the two")
    if entry.load_inplace and entry.url is None:
        raise UserError(f"{path}.load_inplace: true is for a url; remove it")
    return (entry,)
