"""LangChain's ChatOpenAI, unmodified: invoke, stream, tools, structured output. argv: base URL, key, model."""

import json
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

url, key, model = sys.argv[1:]
chat = ChatOpenAI(base_url=url, api_key=key, model=model, temperature=0, max_tokens=12, max_retries=0)
messages = [SystemMessage("Answer shortly."), HumanMessage("What is the capital of France?")]
whole = chat.invoke(messages)
pieces = [piece.content for piece in chat.stream(messages)]
schema = {
    "title": "City",
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}},
    "required": ["name"],
    "additionalProperties": False,
}
longer = ChatOpenAI(base_url=url, api_key=key, model=model, temperature=0, max_tokens=60, max_retries=0)
structured = longer.with_structured_output(schema, method="json_schema").invoke("Name a city.")
tool = {"type": "function", "function": {"name": "look_up", "description": "Look up.", "parameters": schema}}
called = longer.bind_tools([tool], tool_choice="look_up").invoke("Look up a city.")
print(
    json.dumps(
        {
            "text": whole.content,
            "streamed": "".join(pieces),
            "pieces": len(pieces),
            "usage": whole.usage_metadata["output_tokens"],
            "structured": structured,
            "calls": [{"name": call["name"], "args": call["args"]} for call in called.tool_calls],
        }
    )
)
