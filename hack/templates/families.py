"""Chat templates that behave as those of 20 model families do, written for this page.

Each has the peculiarity that decides what is trained on, and nothing else of the family's own
template.
"""
# ruff: noqa: E501 (a template in pieces is harder to read)

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A chat template and its stop tokens. `peculiarity` is what decides what is trained on."""

    name: str
    peculiarity: str
    template: str
    stops: tuple[str, ...] = ("<|im_end|>",)


_TURN = "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_CHATML = "{% for m in messages %}" + _TURN + "{% endfor %}" + _PROMPT
_TOOLS = "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
_CALLS = "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
_LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
_CUT = "{% set text = (m.content or '').split('</think>')[-1].strip() %}"


def _thinking(block: str, prompt: str) -> str:
    """A template that writes a block of reasoning only after the last question."""
    return (
        _TOOLS + _LAST_QUESTION + "{% for m in messages %}{% if m.role == 'assistant' %}" + _CUT
        + "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last %}" + block + "{% endif %}{{ text }}" + _CALLS
        + "{{ '<|im_end|>\n' }}{% else %}" + _TURN + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )  # fmt: skip


_BLOCK = "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}"
_LAST_BLOCK = "{% if loop.last or m.reasoning_content %}" + _BLOCK + "{% endif %}"
_INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + (m.content or '') }}"
)
_HEADERS = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + %s + '<|eot_id|>' }}"
_HEADER_PROMPT = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
_ROLES = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + (m.content or '') + '<|end|>\n' }}{% endfor %}"
_R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'tool' %}"
    "{{ '<tool_output>' + m.content + '</tool_output>' }}{% elif m.role == 'system' %}{{ m.content }}"
    "{% else %}" + _CUT + "{{ '<|Assistant|>' + OPEN + text }}" + _CALLS + "{{ '<|end_of_sentence|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' + PROMPT }}{% endif %}"
)
_HARMONY = (
    "{% if tools %}{{ '<|start|>developer<|message|>' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{% set ns = namespace(final=-1) %}{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}"
    "{% set ns.final = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{% if m.thinking and (loop.last or loop.index0 > ns.final) %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "{{ '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary<|message|>' + (f.arguments | tojson) + '<|call|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
_DATED = "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '<|eot_id|>' }}"

FAMILIES = (
    Family("ChatML (SmolLM2)", "neither tools nor calls nor reasoning", _CHATML),
    Family(
        "Qwen2.5",
        "tools and calls",
        _TOOLS
        + "{% for m in messages %}"
        + _TURN.replace("(m.content or '') + '<", "(m.content or '') }}" + _CALLS + "{{ '<")
        + "{% endfor %}"
        + _PROMPT,
    ),
    Family(
        "Qwen3",
        "an empty thought in the last answer, reasoning after the last question",
        _thinking(_LAST_BLOCK, "<|im_start|>assistant\n"),
    ),
    Family(
        "Qwen3 Thinking",
        "the prompt opens a thought, which every answer after the last question has",
        _thinking(_BLOCK, "<|im_start|>assistant\n<think>\n"),
    ),
    Family(
        "Qwen3 without thinking",
        "the prompt has an empty thought",
        _thinking(_BLOCK, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ),
    Family(
        "Llama 2",
        "question and answer in one turn, no roles for tools",
        _INST
        + "{{ ' </s>' }}{% else %}{{ raise_exception('only user and assistant are supported') }}{% endif %}{% endfor %}",
        ("</s>",),
    ),
    Family(
        "Llama 3",
        "neither tools nor calls",
        "{% for m in messages %}" + _HEADERS % "(m.content or '')" + "{% endfor %}" + _HEADER_PROMPT,
        ("<|eot_id|>",),
    ),
    Family(
        "Llama 3.2",
        "today's date, one call instead of the content",
        _DATED
        + "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        + _HEADERS % "((m.tool_calls[0].function | tojson) if m.tool_calls else m.content)"
        + "{% endfor %}"
        + _HEADER_PROMPT,
        ("<|eot_id|>",),
    ),
    Family(
        "Mistral 7B v0.3",
        "tools before the last question only",
        _LAST_QUESTION
        + _INST.replace(
            "{{ '[INST] '",
            "{% if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST] '",
        )
        + "{% if m.tool_calls %}{{ '[TOOL_CALLS]' + (m.tool_calls | tojson) }}{% endif %}{{ '</s>' }}{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}",
        ("</s>",),
    ),
    Family(
        "Magistral",
        "reasoning as text in [THINK]",
        _TOOLS
        + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}{{ '[THINK]' + m.reasoning_content + '[/THINK]' }}{% endif %}{{ m.content or '' }}"
        + _CALLS
        + "{{ '<|im_end|>\n' }}{% endfor %}"
        + _PROMPT,
    ),
    Family(
        "Gemma 2",
        "refuses system prompts and tools",
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception(m.role + ' role not supported') }}{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (m.content or '') | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<end_of_turn>",),
    ),
    Family(
        "Gemma 3",
        "roles must alternate, so tool results are refused",
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{{ '<start_of_turn>' + m.role + '\n' + (m.content or '') | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}",
        ("<end_of_turn>",),
    ),
    Family(
        "Phi-3",
        "an end-of-text token after the last turn",
        _ROLES + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        ("<|end|>", "<|endoftext|>"),
    ),
    Family(
        "Phi-4",
        "neither tools nor calls",
        _ROLES + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("<|end|>",),
    ),
    Family(
        "DeepSeek-R1 (distilled)",
        "the prompt opens a thought, which no answer has",
        _R1.replace("OPEN + ", "").replace("PROMPT", "'<think>\n'"),
        ("<|end_of_sentence|>",),
    ),
    Family("DeepSeek-V3", "no thoughts", _R1.replace("OPEN + ", "").replace(" + PROMPT", ""), ("<|end_of_sentence|>",)),
    Family(
        "DeepSeek-V3.1",
        "prompt and answers close a thought",
        _R1.replace("OPEN", "'</think>'").replace("PROMPT", "'</think>'"),
        ("<|end_of_sentence|>",),
    ),
    Family(
        "Nemotron",
        "the prompt opens a thought, answers have an empty one",
        _R1.replace("OPEN", "'<think></think>'").replace("PROMPT", "'<think>\n'"),
        ("<|end_of_sentence|>",),
    ),
    Family(
        "gpt-oss",
        "reasoning until a final answer follows, other end tokens for the last answer",
        _HARMONY,
        ("<|return|>", "<|call|>"),
    ),
    Family(
        "Granite 3",
        "today's date, tools, no reasoning",
        _DATED
        + _TOOLS
        + "{% for m in messages %}"
        + _TURN.replace("(m.content or '') + '<", "(m.content or '') }}" + _CALLS + "{{ '<")
        + "{% endfor %}"
        + _PROMPT,
    ),
)
