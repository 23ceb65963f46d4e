"""A chat template that does not end, or that eats memory, is refused in one line; a process has its own limits back after that."""

import resource
import signal
import time
from types import SimpleNamespace

import pytest

from megatron_lora.data import render_bounds
from megatron_lora.data.chat_template import ChatSettings, ChatTemplate
from megatron_lora.errors import UserError

DOUBLING = "{% set n = namespace(x='a' * 999) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"


@pytest.fixture
def template(monkeypatch):
    """Make a template of small bounds."""
    for name, value in (("MOST_CPU_S", 1.0), ("MOST_BYTES", 1 << 26)):
        monkeypatch.setattr(render_bounds, name, value)
    return lambda text: ChatTemplate(SimpleNamespace(special_tokens_map={}, get_chat_template=lambda tools: None), ChatSettings(text))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it took more than"),
        (DOUBLING, "MemoryError"),
        ("{{ 'a' * 99999999999 }}", "MemoryError"),
        ("{{ messages[0].content|center(34000000) }}", r"it writes 34,000,000 characters|MemoryError"),
    ],
)
def test_a_template_beyond_its_bounds_is_refused_for_every_record(template, text, why):
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    made = template(text)
    for _ in range(2):
        start = time.process_time()
        with pytest.raises(UserError, match=rf"rows:1: the chat template refuses .*: it goes beyond the bounds of a template \(({why})"):
            made.render([{"role": "user", "content": "hi"}], None, {}, "rows:1")
    assert time.process_time() - start < 0.1, "no other record costs as much"
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_template_within_them_is_rendered(template):
    assert template("{{ messages[0].content * 1000 }}").render([{"role": "user", "content": "hi"}], None, {}, "") == "hi" * 1000
