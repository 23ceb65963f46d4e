"""Chat templates in the manner of current model families, written for the tests, each with generation marks as an oracle of its masks.

`unmarked` gives the template without its marks, as most models have it. The marks hold what an assistant
wrote with the end of its turn. Line breaks and indents here are no part of a template.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A template and the tokens that its tokenizer has; what its conversations may hold, of system, tools and thoughts."""

    template: str
    tokens: tuple[str, ...]
    eos: str
    bos: str | None
    holds: frozenset[str]


def family(template, tokens="", holds="", eos="</s>", bos=None):
    return Family(re.sub(r"\n *", "", template), tuple(tokens.split()), eos, bos, frozenset(holds.split()))


FAMILIES = {
    "default system prompt, tools by tojson": family(  # as Qwen2.5
        r"""
        {% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% else %}
        {% set system = 'You are kind.' %}{% endif %}{{ '<|im_start|>system\n' + system }}{% if tools %}{{ '\n# Tools\n' }}
        {% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% for m in messages %}
        {% if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}
        {{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}
        {{ '\n<tool_call>\n' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson) + '\n</tool_call>' }}
        {% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% elif m.role == 'tool' %}
        {{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}{% endif %}{% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
        """,
        tokens="<|im_start|> <|im_end|> <tool_call> </tool_call>",
        holds="system tools",
        eos="<|im_end|>",
    ),
    "thoughts stripped before the last question": family(  # as Qwen3
        r"""
        {% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}
        {% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' %}
        {% set thought = '' %}{% if m.reasoning_content %}{% set thought = m.reasoning_content %}{% elif '</think>' in c %}
        {% set thought = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}
        {% if loop.index0 > ns.last and not thought %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% generation %}
        {% if loop.index0 > ns.last and thought %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ c }}
        {% for k in m.tool_calls or [] %}
        {{ '\n<tool_call>\n' + k.function.name + ' ' + k.function.arguments | tojson + '\n</tool_call>' }}{% endfor %}
        {{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% elif m.role == 'tool' %}
        {{ '<|im_start|>user\n<tool_response>\n' + c + '\n</tool_response><|im_end|>\n' }}{% else %}
        {{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}
        {{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}
        {{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}
        """,
        tokens="<|im_start|> <|im_end|> <think> </think>",
        holds="system thoughts tools",
        eos="<|im_end|>",
    ),
    "today's date, trimmed, another end after calls": family(  # as Llama 3.1
        r"""
        {{ bos_token }}{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}
        {% set ns.system = messages[0].content | trim %}{% endif %}
        {{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}{% if tools %}
        {% for t in tools %}{{ t | tojson(indent=4) + '\n' }}{% endfor %}{% endif %}{{ ns.system + '<|eot_id|>' }}
        {% for m in messages %}{% if m.role == 'system' and loop.first %}{% elif m.role == 'assistant' %}
        {{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% generation %}{% if m.tool_calls %}
        {% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}{% endfor %}
        {{ '<|eom_id|>' }}{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endgeneration %}
        {% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}
        {% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endif %}
        {% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
        """,
        tokens="<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|>",
        holds="system tools",
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "strict order, system and tools on the last question": family(  # as Mistral
        r"""
        {% set ns = namespace(system='', last=-1, index=0) %}{% if messages[0].role == 'system' %}
        {% set ns.system = messages[0].content %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}
        {% set ns.last = loop.index0 %}{% endif %}{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
        {% if (m.role == 'user') != (ns.index % 2 == 0) %}
        {{ raise_exception('conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
        {% set ns.index = ns.index + 1 %}{% endif %}
        {% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls and messages[loop.index0 - 1].role != 'tool' %}
        {{ raise_exception('a result without a call') }}{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}
        {% if m.role == 'user' %}{% if loop.index0 == ns.last and tools %}
        {{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}{% if loop.last and ns.system %}
        {{ '[INST] ' + ns.system + '\n\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}
        {% endif %}{% elif m.role == 'assistant' %}{% generation %}{% if m.tool_calls %}{{ '[TOOL_CALLS] [' }}
        {% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ ']' + eos_token }}{% else %}
        {{ ' ' + m.content | trim + eos_token }}{% endif %}{% endgeneration %}{% elif m.role == 'tool' %}
        {{ '[TOOL_RESULTS] ' + {'content': m.content} | tojson + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}
        """,
        tokens="[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
        holds="system tools",
        bos="<s>",
    ),
    "system folded into the first question": family(  # as Gemma
        r"""
        {{ bos_token }}{% set first = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}
        {% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% endif %}{% for m in rest %}
        {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}
        {% endif %}{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}{% generation %}
        {{ m.content | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}{% else %}
        {{ '<start_of_turn>user\n' + (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endif %}
        {% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
        """,
        tokens="<start_of_turn> <end_of_turn>",
        holds="system",
        eos="<eos>",
        bos="<bos>",
    ),
    "another token at the very end": family(  # as Phi
        r"""
        {% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}
        {{ m.content + '<|end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}
        {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}
        """,
        tokens="<|system|> <|user|> <|assistant|> <|end|>",
        holds="system",
        eos="<|endoftext|>",
    ),
    "thoughts never shown, prompt opens one": family(  # as DeepSeek-R1
        r"""
        {{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}
        {{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}{{ '<|Assistant|>' }}{% generation %}
        {{ m.content.split('</think>')[-1] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}
        {% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}
        """,
        tokens="<|User|> <|Assistant|> <think> </think>",
        holds="system",
        eos="<|end_of_sentence|>",
        bos="<|begin_of_sentence|>",
    ),
    "channels, another end for the last answer": family(  # as gpt-oss
        r"""
        {{ '<|start|>system<|message|>You are a model.<|end|>' }}{% for m in messages %}{% if m.role == 'system' %}
        {{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}{% elif m.role == 'assistant' %}
        {{ '<|start|>assistant' }}{% generation %}{% if m.thinking and loop.last %}
        {{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' }}{% endif %}
        {{ '<|channel|>final<|message|>' + m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endgeneration %}
        {% else %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
        {% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
        """,
        tokens="<|start|> <|channel|> <|message|> <|end|> <|return|>",
        holds="system thoughts",
        eos="<|return|>",
    ),
    "ends of several ordinary tokens": family(  # as older instruction formats
        r"""
        {% for m in messages %}{{ '### ' + m.role | capitalize + ':\n' }}{% if m.role == 'assistant' %}{% generation %}
        {{ m.content + '\n### End' }}{% endgeneration %}{{ '\n\n' }}{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}
        {% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}
        """,
        holds="system",
    ),
    "chatml on a tokenizer without its tokens": family(
        r"""
        {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}
        {{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}
        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
        """,
        holds="system",
    ),
    "eos after a line": family(  # as Zephyr
        r"""
        {% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}
        {{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{{ '\n' }}{% endfor %}
        {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
        """,
        holds="system",
    ),
    "a blank before the answer and before its end": family(  # as Llama 2 and Vicuna
        r"""
        {{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}
        {{ 'USER: ' + m.content | trim + ' ASSISTANT:' }}{% else %}{% generation %}
        {{ ' ' + m.content | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}
        """,
        holds="system",
        bos="<s>",
    ),
    "an empty thought in every turn": family(  # as GLM 4.5, with an end of its own
        r"""
        {% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}
        {% endif %}{% endfor %}{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>' }}
        {% if m.role == 'assistant' %}{% set c = m.content %}{% set thought = '' %}{% if '</think>' in c %}
        {% set thought = c.split('</think>')[0].split('<think>')[-1] %}{% set c = c.split('</think>')[-1] %}{% endif %}
        {{ '\n' }}{% if loop.index0 > ns.last and thought %}{% generation %}
        {{ '<think>' + thought.strip() + '</think>' + '\n' + c.strip() + '<|endturn|>' }}{% endgeneration %}{% else %}
        {{ '<think></think>\n' }}{% generation %}{{ c.strip() + '<|endturn|>' }}{% endgeneration %}{% endif %}{% else %}
        {{ '\n' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
        """,
        tokens="[gMASK] <sop> <|system|> <|user|> <|assistant|> <think> </think> <|endturn|>",
        holds="system thoughts",
        eos="<|endturn|>",
    ),
}


def unmarked(template: str) -> str:
    """Return a template without its generation marks."""
    return re.sub(r"\{% (end)?generation %\}", "", template)
