"""Chat templates by name, for base models that come without one. Each marks what an assistant generates: its text and the end of its turn.

chatml    <|im_start|>user ... <|im_end|>
llama3    <|start_header_id|>user<|end_header_id|> ... <|eot_id|>
gemma     <start_of_turn>user ... <end_of_turn>
plain     User: ... / Assistant: ... and the tokenizer's own eos, for models whose chat tokens are untrained
"""

from types import MappingProxyType

_CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}
{{- '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_LLAMA3 = """{{ bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

_GEMMA = """{{ bos_token }}
{%- set start = namespace(system='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% set start.system = message['content'] | trim + '\n\n' %}
{%- elif message['role'] == 'assistant' %}
{{- '<start_of_turn>model\n' }}
{%- generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}
{%- else %}
{{- '<start_of_turn>' + message['role'] + '\n' + start.system + message['content'] | trim + '<end_of_turn>\n' }}
{%- set start.system = '' %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

_PLAIN = """{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}{{ 'Assistant:' }}
{%- generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}{{ '\n\n' }}
{%- else %}{{ message['role'] | capitalize + ': ' + message['content'] | trim + '\n\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

NAMED_TEMPLATES = MappingProxyType({"chatml": _CHATML, "llama3": _LLAMA3, "gemma": _GEMMA, "plain": _PLAIN})
