"""The checkpoint's chat template -> MLC's conv_template."""

from __future__ import annotations

from typing import Any


def plain_template(prefix: list[int], stop_token_ids: list[int]) -> dict[str, Any]:
    """The template that adds nothing: messages one after the other."""
    return {
        "name": "plain",
        "system_template": "{system_message}",
        "system_message": "",
        "system_prefix_token_ids": prefix,
        "add_role_after_system_message": True,
        "roles": {"user": "", "assistant": "", "tool": ""},
        "role_templates": {
            "user": "{user_message}",
            "assistant": "{assistant_message}",
            "tool": "{tool_message}",
        },
        "messages": [],
        "seps": [""],
        "role_content_sep": "",
        "role_empty_sep": "",
        "stop_str": [],
        "stop_token_ids": stop_token_ids,
        "function_string": "",
        "use_function_calling": False,
    }
