"""Writes reference.jsonl: what Jinja2, set up as transformers sets it up, makes of random conversations.

    python3 -m venv /tmp/parity && /tmp/parity/bin/pip install jinja2==3.1.6
    /tmp/parity/bin/python tests/template_parity/make_reference.py

The conversations are seeded, so the file only changes when a template or this script does. Every row is one
conversation, as hotloop's own types take it (arguments and schemas as JSON text), and what each template makes of it:
{"text": ...}, {"refused": message of raise_exception} or {"failed": true} for any other error.
"""

import json
import random
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TEMPLATES = {path.stem: path for path in sorted((ROOT / "tests" / "templates").glob("*.jinja"))}
TEMPLATES["sim"] = ROOT / "models" / "sim" / "chat_template.jinja"
CONVERSATIONS = 150
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}

WORDS = "the weather in Oslo is 12.5 degrees, call it again with more detail please Straße naïve".split()
NASTY = [
    "", " ", "\n", "  leading and trailing  ", "\n\nlines\n\n", "tab\tand\rreturn", "a\r\nb\r\n", "\u00a0nbsp\u00a0",
    "\x1cseparator\x1f", "e\u0301 combining", "<|im_end|>\n<|im_start|>system", "</think>\n\nafter", "<think>x</think>y",
    "[/INST]</s>", "<|eot_id|>", '{"json": [1, 2.0, null]}', "{{ not_jinja }} {% raw %}", 'quotes " and \' and \\',
    "\u2028line\u2029para", "emoji 👩‍💻🇳🇴", "漢字かな", "עברית \u200f", "\x00\x07\x7f", "<b>&amp;</b>", "%s {} $1",
]


class Generation(Extension):
    """`{% generation %}` as a block that prints its body; transformers also notes where it stood."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def environment(now):
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = now.strftime
    return env


def text(rng):
    if rng.random() < 0.3:
        return rng.choice(NASTY)
    return " ".join(rng.choices(WORDS + NASTY, weights=[4] * len(WORDS) + [1] * len(NASTY), k=rng.randint(1, 9)))


def value(rng, depth=0):
    kind = rng.randrange(9 if depth < 2 else 7)
    if kind == 0:
        return rng.choice([0, -1, 7, 2**31, 2**53 + 1, -(2**63), 2**64, 10**30, -(10**40)])
    if kind == 1:
        return rng.choice([0.0, 1.0, -0.5, 1e-5, 1e16, 1.5e300, 0.1 + 0.2, 123456789.125])
    if kind == 2:
        return rng.choice([True, False, None])
    if kind < 7:
        return text(rng)
    if kind == 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {rng.choice(["a", "items", "keys", "name", "ключ", 'q"'] + WORDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def schema(rng, depth=0):
    kind = rng.choice(["string", "integer", "number", "boolean", "array", "object"] if depth < 2 else ["string", "integer"])
    spec = {"type": kind}
    if kind == "string" and rng.random() < 0.4:
        spec["enum"] = ["metric", "imperial", 'odd "one"']
    if kind == "array" and rng.random() < 0.7:
        spec["items"] = schema(rng, depth + 1)
    if kind == "object":
        names = rng.sample(["city", "items", "unit", "ключ", "get"], rng.randint(0, 3))
        spec["properties"] = {name: schema(rng, depth + 1) for name in names}
        spec["required"] = names[:1]
    if rng.random() < 0.3:
        spec["description"] = text(rng)
    if rng.random() < 0.3:
        spec["default"] = value(rng, 1)
    return spec


def tools(rng):
    if rng.random() < 0.45:
        return None
    found = []
    for name in rng.sample(["get_weather", "search", "run_code"], rng.randint(1, 2)):
        parameters = {"type": "object", "properties": {}, "required": []}
        for field in rng.sample(["city", "unit", "items", "query"], rng.randint(0, 3)):
            parameters["properties"][field] = schema(rng, 1)
            if rng.random() < 0.5:
                parameters["required"].append(field)
        # However the client wrote its schema, the template prints what Python makes of it.
        layout = rng.choice([{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])
        tool = {"name": name, "parameters": json.dumps(parameters, **layout)}
        if rng.random() < 0.8:
            tool["description"] = text(rng)
        found.append(tool)
    return found


def call(rng):
    arguments = value(rng, 1) if rng.random() < 0.2 else {name: value(rng, 1) for name in rng.sample(["city", "unit", "items", "n"], rng.randrange(4))}
    if not isinstance(arguments, dict):
        arguments = {"value": arguments}
    size = 9 if rng.random() < 0.9 else 5
    return {
        "id": "".join(rng.choices("abcdefghijkXYZ0123456789", k=size)),
        "name": rng.choice(["get_weather", "search", "run_code"]),
        "arguments": json.dumps(arguments, ensure_ascii=False),
    }


def conversation(rng):
    messages = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": text(rng)})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text(rng)})
        for _ in range(rng.choice([0, 0, 1, 2])):
            calls = [call(rng) for _ in range(rng.choice([1, 1, 1, 2]))]
            turn = {"role": "assistant", "calls": calls}
            if rng.random() < 0.4:
                turn["content"] = text(rng)
            if rng.random() < 0.5:
                turn["reasoning"] = text(rng)
            messages.append(turn)
            for made in calls:
                messages.append({"role": "tool", "call_id": made["id"], "name": made["name"], "content": text(rng)})
        turn = {"role": "assistant", "content": text(rng), "calls": []}
        if rng.random() < 0.5:
            turn["reasoning"] = text(rng)
        messages.append(turn)
    # Conversations end anywhere, and now and then are out of order.
    del messages[rng.randint(1, len(messages)) :]
    if rng.random() < 0.06:
        messages.append({"role": rng.choice(["system", "developer", "critic"]), "content": text(rng)})
    if rng.random() < 0.06:
        messages.insert(0, messages.pop())
    kwargs = {}
    if rng.random() < 0.4:
        kwargs["enable_thinking"] = rng.random() < 0.5
    if rng.random() < 0.3:
        kwargs["reasoning_effort"] = rng.choice(["low", "high"])
    if rng.random() < 0.2:
        kwargs["tools_in_user_message"] = rng.random() < 0.5
    if rng.random() < 0.2:
        kwargs["date_string"] = "1 Jan 2025"
    now = datetime(rng.randint(2023, 2027), rng.randint(1, 12), rng.randint(1, 28), rng.randrange(24), rng.randrange(60), 5)
    return {
        "messages": messages,
        "tools": tools(rng),
        "add_generation_prompt": rng.random() < 0.7,
        "now": now.isoformat(),
        "kwargs": kwargs,
    }


def as_transformers_sees(message):
    if message["role"] == "tool":
        return {"role": "tool", "content": message["content"], "tool_call_id": message["call_id"], "name": message["name"]}
    if message["role"] != "assistant":
        return message
    seen = {"role": "assistant", "content": message.get("content", "")}
    if "reasoning" in message:
        # Users of gpt-oss pass `thinking`, all others `reasoning_content`; no template here reads both.
        seen["reasoning_content"] = seen["thinking"] = message["reasoning"]
    if message["calls"]:
        seen["tool_calls"] = [
            {"id": made["id"], "type": "function", "function": {"name": made["name"], "arguments": json.loads(made["arguments"])}}
            for made in message["calls"]
        ]
    return seen


def tool_as_transformers_sees(tool):
    function = {"name": tool["name"]}
    if "description" in tool:
        function["description"] = tool["description"]
    function["parameters"] = json.loads(tool["parameters"])
    return {"type": "function", "function": function}


def render(path, row):
    env = environment(datetime.fromisoformat(row["now"]))
    template = env.from_string(path.read_text(encoding="utf-8"))
    tools = row["tools"] and [tool_as_transformers_sees(tool) for tool in row["tools"]]
    try:
        return {
            "text": template.render(
                messages=[as_transformers_sees(message) for message in row["messages"]],
                tools=tools,
                documents=None,
                add_generation_prompt=row["add_generation_prompt"],
                **{**SPECIALS, **row["kwargs"]},
            )
        }
    except Exception as error:
        if type(error) is jinja2.exceptions.TemplateError:
            return {"refused": error.message}
        return {"failed": True}


def main():
    rng = random.Random(20261123)
    lines = []
    for _ in range(CONVERSATIONS):
        row = conversation(rng)
        row["expected"] = {name: render(path, row) for name, path in TEMPLATES.items()}
        lines.append(json.dumps(row, ensure_ascii=False))
    (HERE / "reference.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
