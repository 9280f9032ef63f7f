"""Scores a served model on held-out rollouts: names, paths and values that training never saw.

    cargo run --release -- serve                                   # in another terminal
    venv/bin/python evaluate.py --count 1000                       # prints a table

Every rollout runs on a stream of a real server. The task is sent, each call of the model is compared with the right
one and answered from the rollout's world, until the model answers. A call counts as right when its name and
arguments, read as JSON, are those expected and nothing else was called with it; a rollout when all its calls are right
and each answer is the expected one, to the letter. After the first mistake a rollout is over and all that it still
had to do counts as wrong.
"""

import argparse
import collections
import concurrent.futures
import importlib
import json
import math
import os
import queue
import random
import sys
import tempfile
from pathlib import Path

import grpc

import rollouts

ROOT = Path(__file__).resolve().parents[3]


def stubs():
    """The modules of the protocol, made from the repository's own definitions where there are none yet."""
    modules = [f"hotloop.v1.{name}" for name in ("items_pb2", "responses_pb2", "responses_pb2_grpc")]
    try:
        return [importlib.import_module(name) for name in modules]
    except ModuleNotFoundError:
        from grpc_tools import protoc

        out = tempfile.mkdtemp()
        protos = [f"hotloop/v1/{name}.proto" for name in ("items", "responses", "models")]
        if protoc.main(["", f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--grpc_python_out={out}", *protos]):
            raise SystemExit("the protocol does not compile")
        sys.path.insert(0, out)
        importlib.invalidate_caches()
        return [importlib.import_module(name) for name in modules]


items, pb, rpc = stubs()


class Wrong(Exception):
    """The model did something else than it should have."""


class Talk:
    """One rollout on a stream of its own."""

    def __init__(self, channel, options):
        self.send = queue.SimpleQueue()
        key = os.environ.get("HOTLOOP_API_KEY")
        metadata = [("authorization", f"Bearer {key}")] if key else ()
        self.events = rpc.ResponsesServiceStub(channel).Connect(iter(self.send.get, None), metadata=metadata)
        self.model, self.previous = options.model, None
        self.strict = options.strict

    def sample(self, rollout, given):
        """Sends what is new, and returns what the model makes of it: its text, and its calls."""
        create = pb.Create(input=given, deltas=False, temperature=0.0, max_output_tokens=400)
        if self.previous:
            create.previous_response_id = self.previous
        else:
            if self.model:
                create.model = self.model
            first = rollout.messages[0]
            if first["role"] == "system":
                create.instructions = first["content"]
            for tool in rollout.tools:
                function = tool["function"]
                create.tools.add().function.CopyFrom(
                    items.FunctionTool(
                        name=function["name"],
                        description=function["description"],
                        parameters=json.dumps(function["parameters"]),
                        strict=self.strict,
                    )
                )
        self.send.put(pb.ConnectRequest(create=create))
        text, calls = "", []
        for event in self.events:
            kind = event.WhichOneof("event")
            if kind == "error":
                raise Wrong(f"error: {event.error.code} {event.error.message}")
            if kind == "output_item_done":
                item = event.output_item_done.item
                if item.HasField("function_call"):
                    calls.append(item.function_call)
                elif item.HasField("message"):
                    text += "".join(part.output_text.text for part in item.message.content)
            if kind == "done":
                self.previous = event.response_id
                return text, calls
        raise Wrong("the stream ended")

    def close(self):
        self.send.put(None)
        for _ in self.events:
            pass


def key(name, arguments):
    return name, json.dumps(arguments, sort_keys=True)


def play(talk, rollout, score):
    """Plays a rollout to its end, or to the first mistake."""
    given, at = [], 0
    messages = rollout.messages
    while at < len(messages):
        message = messages[at]
        if message["role"] != "assistant":
            # What the system says are the instructions of the first create.
            if message["role"] == "user":
                given.append(items.Item(user_text=message["content"]))
            at += 1
            continue
        text, calls = talk.sample(rollout, given)
        given = []
        expected = message.get("tool_calls", [])
        ids = {}
        for call in calls:
            score["made"] += 1
            try:
                arguments = json.loads(call.arguments)
                score["well_formed"] += isinstance(arguments, dict)
            except ValueError:
                arguments = None
            ids.setdefault(key(call.name, arguments), []).append(call.call_id)
        wanted = collections.Counter(key(c["function"]["name"], c["function"]["arguments"]) for c in expected)
        made = collections.Counter({called: len(found) for called, found in ids.items()})
        if made != wanted:
            raise Wrong(f"called {sorted(made)}, not {sorted(wanted)}" + (f", and said {text!r}" if text else ""))
        score["calls_right"] += len(expected)
        if not expected and text.strip() != message["content"].strip():
            raise Wrong(f"said {text!r}, not {message['content']!r}")
        at += 1
        by_id = {c["id"]: key(c["function"]["name"], c["function"]["arguments"]) for c in expected}
        while at < len(messages) and messages[at]["role"] == "tool":
            output = messages[at]
            call_id = ids[by_id[output["tool_call_id"]]].pop(0)
            given.append(
                items.Item(function_call_output=items.FunctionCallOutput(call_id=call_id, output=output["content"]))
            )
            at += 1


def scored(channel, rollout, options):
    score = collections.Counter(
        rollouts=1, calls=sum(len(message.get("tool_calls", [])) for message in rollout.messages)
    )
    talk = Talk(channel, options)
    mistake = None
    try:
        play(talk, rollout, score)
        score["right"] = 1
    except Wrong as wrong:
        mistake = str(wrong)
    talk.close()
    return rollout, score, mistake


def interval(right, count):
    """The part that is right, with the bounds of its 95 % interval (Wilson, 1927)."""
    if not count:
        return "-"
    z, part = 1.96, right / count
    middle = (part + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(part * (1 - part) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return f"{100 * part:.1f} % ({100 * (middle - reach):.1f} to {100 * (middle + reach):.1f})"


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--server", default="127.0.0.1:50051")
    arguments.add_argument("--model", default="", help="the server's default model where it is not given")
    arguments.add_argument("--split", choices=("heldout", "train"), default="heldout")
    arguments.add_argument("--seed", type=int, default=2026)
    arguments.add_argument("--count", type=int, default=1000)
    arguments.add_argument("--strict", action="store_true", help="have the server hold calls to their schemas")
    arguments.add_argument("--streams", type=int, default=4, help="rollouts at once")
    arguments.add_argument("--mistakes", type=int, default=0, help="how many to show")
    arguments.add_argument("--at-least", type=float, metavar="PERCENT", help="fails where fewer rollouts are right")
    options = arguments.parse_args()

    rng = random.Random(options.seed)
    drawn = [rollouts.rollout(rng, options.split) for _ in range(options.count)]
    families, lengths, mistakes = {}, {}, []
    total = collections.Counter()
    with grpc.insecure_channel(options.server) as channel:
        with concurrent.futures.ThreadPoolExecutor(options.streams) as pool:
            for rollout, score, mistake in pool.map(lambda one: scored(channel, one, options), drawn):
                total += score
                families.setdefault(rollout.family.split("+")[0], collections.Counter()).update(score)
                lengths.setdefault(score["calls"], collections.Counter()).update(score)
                if mistake:
                    mistakes.append((rollout, mistake))
    print("| task | rollouts | right | calls | right |\n| --- | --- | --- | --- | --- |")

    def row(name, score):
        right = f"{score['right'] / score['rollouts']:.1%}"
        calls = f"{score['calls_right'] / score['calls']:.1%}" if score["calls"] else "-"
        print(f"| {name} | {score['rollouts']} | {right} | {score['calls']} | {calls} |")

    for name in sorted(families):
        row(name, families[name])
    for length in sorted(lengths):
        row(f"*with {length} calls*", lengths[length])
    print(f"\nrollouts right: {interval(total['right'], total['rollouts'])} of {total['rollouts']}")
    print(f"calls right: {interval(total['calls_right'], total['calls'])} of {total['calls']}")
    print(f"calls made with arguments that are a JSON object: {total['well_formed']} of {total['made']}")
    for rollout, mistake in mistakes[: options.mistakes]:
        print(f"\n{rollout.family}: {[m['content'] for m in rollout.messages if m['role'] == 'user']}")
        print(f"  {mistake}")
    if options.at_least and 100 * total["right"] < options.at_least * total["rollouts"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
