"""Chat formats: messages to a prompt (render.py, template.py) and generated text back to a message (parse.py).

`ChatTemplate` chooses between our DeepSeek-V3.1 / V3.2-Exp renderer and the checkpoint's own Jinja template;
`ChatParser` splits the generated text into reasoning, content and tool calls while it streams.
May be imported from here: the names below. Imports downwards only: engine.tokenizer, engine.messages; no torch.
"""

from tilery.server.chat.parse import (
    ChatDelta,
    ChatParser,
    DeltaKind,
    ParsedMessage,
    ToolCall,
    params_for_parsing,
    parse,
)
from tilery.server.chat.render import ChatFormatError, ChatPrompt, render, render_prompt
from tilery.server.chat.template import ChatTemplate

__all__ = [
    "ChatDelta",
    "ChatFormatError",
    "ChatParser",
    "ChatPrompt",
    "ChatTemplate",
    "DeltaKind",
    "ParsedMessage",
    "ToolCall",
    "params_for_parsing",
    "parse",
    "render",
    "render_prompt",
]
