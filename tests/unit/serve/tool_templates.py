"""Chat templates that write tool calls in the forms that models come with, and one that writes none."""

from __future__ import annotations

# As Qwen 2.5's and Hermes 3's.
HERMES = """\
{%- if tools %}{{- '<|im_start|>system\\nYou may call these functions:' }}
{%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{% endfor %}
{{- '\\nWrite <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant' }}{% if message.content %}{{- '\\n' ~ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# As Llama 3.1's: one call, which is the whole answer.
LLAMA3 = """\
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n\\n' }}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ '}' }}
{%- else %}{{- message.content }}{% endif %}
{{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{% endif %}"""

# As Mistral's: ids of nine letters and digits, or an error.
MISTRAL = """\
{%- for message in messages %}
{%- if message.tool_calls %}{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{% endif %}
{{- (call.function | tojson)[:-1] ~ ', "id": "' ~ call.id ~ '"}' }}{% if not loop.last %}{{- ', ' }}{% endif %}
{%- endfor %}{{- ']' ~ eos_token }}
{%- else %}{{- '[' ~ message.role ~ ']' ~ message.content ~ eos_token }}{% endif %}
{%- endfor %}"""

# As Mistral's since its tokenizer 11.
MISTRAL_ARGS = """\
{%- for message in messages %}
{%- if message.tool_calls %}{{- message.content }}
{%- for call in message.tool_calls %}
{{- '[TOOL_CALLS]' ~ call.function.name ~ '[ARGS]' ~ (call.function.arguments | tojson) }}
{%- endfor %}{{- eos_token }}
{%- else %}{{- '[' ~ message.role ~ ']' ~ message.content ~ eos_token }}{% endif %}
{%- endfor %}"""

# As Qwen3-Coder's: inside the same tags, but not JSON.
XML = """\
{%- for message in messages %}{{- message.role ~ ': ' ~ message.content }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' }}
{%- for key, value in call.function.arguments.items() %}
{{- '<parameter=' ~ key ~ '>' ~ value ~ '</parameter>' }}{% endfor %}
{{- '</function>\\n</tool_call>' }}{% endfor %}{{- eos_token }}
{%- endfor %}"""
