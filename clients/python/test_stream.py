"""Plays every part of the protocol through real grpcio, against a server with the simulated model.

    python test_stream.py --server 127.0.0.1:50051 [--model NAME] [CHECK …]

The model has to follow these rules for the text of the user:
  `rollout N`   calls `step` with {"n": k} once a round, N rounds, then answers `finished N steps`
  `parallel N`  calls `step` N times in one sample, then answers `collected: OUTPUT,OUTPUT,…`
  `slow N`      answers N words, slowly
  `think TEXT`  reasons, then answers `I thought about it: TEXT`
  `echo TEXT`   answers TEXT
Exits with 1 if any check fails, and says which.
"""

import argparse
import collections
import json
import os
import queue
import sys
import traceback

import grpc
from hotloop.v1 import items_pb2 as items
from hotloop.v1 import models_pb2 as models
from hotloop.v1 import models_pb2_grpc as models_rpc
from hotloop.v1 import responses_pb2 as pb
from hotloop.v1 import responses_pb2_grpc as rpc

STEPS = 24
STREAM_SECS_MAX = 60
STEP = items.Tool(function=items.FunctionTool(
    name="step",
    description="Takes one step.",
    parameters='{"type":"object","properties":{"n":{"type":"integer"}},'
               '"required":["n"],"additionalProperties":false}'))


class Stream:
    """One stream, with the events of each lane in their order."""

    def __init__(self, server, model, metadata):
        self.server = server
        self.metadata = metadata
        self.channel = grpc.insecure_channel(server)
        self.stub = rpc.ResponsesServiceStub(self.channel)
        self.commands = queue.SimpleQueue()
        self.events = self.stub.Connect(
            iter(self.commands.get, None), timeout=STREAM_SECS_MAX, metadata=metadata)
        self.waiting = collections.defaultdict(collections.deque)
        self.sequence_number = 0
        self.requests = 0
        self.model = model

    def send(self, lane="", **command):
        """Sends one command and returns its request id. No command is one, too."""
        self.requests += 1
        request_id = f"q{self.requests}"
        self.commands.put(pb.ConnectRequest(lane=lane, request_id=request_id, **command))
        return request_id

    def create(self, text=None, lane="", **settings):
        """Sends a create: a new conversation with the tool, unless it continues a response."""
        if text is not None:
            settings.setdefault("input", [items.Item(user_text=text)])
        if "previous_response_id" not in settings:
            settings.setdefault("tools", [STEP])
            if self.model:
                settings.setdefault("model", self.model)
        return self.send(lane=lane, create=pb.Create(**settings))

    def append(self, response_id, *outputs):
        return self.send(append=pb.Append(response_id=response_id, input=outputs))

    def next(self, lane=""):
        """The next message of the lane. Those of other lanes wait for their reader."""
        while not self.waiting[lane]:
            message = self.receive()
            self.waiting[message.lane].append(message)
        return self.waiting[lane].popleft()

    def receive(self):
        """The next message of the stream, whatever its lane."""
        message = next(self.events)
        self.sequence_number += 1
        equal(message.sequence_number, self.sequence_number, "sequence_number")
        return message

    def until(self, event, lane=""):
        """The messages of the lane up to the first of this kind, which is the last of them."""
        messages = []
        while not messages or messages[-1].WhichOneof("event") != event:
            messages.append(self.next(lane))
            kind = messages[-1].WhichOneof("event")
            if kind != event and kind in ("error", "go_away"):
                raise AssertionError(f"instead of {event}: {messages[-1]}")
        return messages

    def round(self, lane=""):
        """One round of a response, to its done."""
        return Round(self.until("done", lane))

    def answers(self, text, lane="", **settings):
        """A whole response to `text` that calls nothing."""
        self.create(text, lane, **settings)
        answer = self.round(lane)
        equal(answer.status, pb.RESPONSE_STATUS_COMPLETED, "status")
        return answer

    def close(self):
        """Half-close; the server ends the stream with OK, and says nothing that nobody awaits."""
        self.commands.put(None)
        equal(list(self.events), [], "messages after the end")
        equal({lane: list(rest) for lane, rest in self.waiting.items() if rest}, {}, "messages left")
        equal(self.events.code(), grpc.StatusCode.OK, "status of the stream")

    def cut(self):
        """Closes the channel with the stream on it, as if the client were gone."""
        self.channel.close()
        self.commands.put(None)


class Round:
    """What came of one round."""

    def __init__(self, messages):
        self.messages = messages
        self.done = messages[-1].done
        self.response_id = messages[-1].response_id
        self.status = self.done.status
        self.created = [m.created for m in messages if m.WhichOneof("event") == "created"]
        whole = [m.output_item_done.item for m in messages if m.WhichOneof("event") == "output_item_done"]
        self.calls = [item.function_call for item in whole if item.HasField("function_call")]
        self.text = "".join(
            part.output_text.text for item in whole for part in item.message.content)
        deltas = "".join(
            m.output_text_delta.delta for m in messages if m.WhichOneof("event") == "output_text_delta")
        equal(deltas, self.text, "deltas and finished text")


def equal(got, wanted, what):
    if got != wanted:
        raise AssertionError(f"{what}: {got!r}, not {wanted!r}")


def holds(condition, what):
    if not condition:
        raise AssertionError(what)


def output(call, text=None):
    return items.Item(function_call_output=items.FunctionCallOutput(
        call_id=call.call_id, output=f"out-{call.call_id}" if text is None else text))


def numbers(calls):
    return [json.loads(call.arguments)["n"] for call in calls]


def check_rollout_of(rounds, calls):
    """The rules of `rollout`: one call a round, numbered one after the other."""
    equal(len(calls), STEPS, "calls")
    first = numbers(calls)[0]
    equal(numbers(calls), list(range(first, first + STEPS)), "arguments")
    equal(len({call.call_id for call in calls}), STEPS, "different call ids")
    equal(rounds[-1].text, f"finished {STEPS} steps", "answer")
    for earlier, later in zip(rounds, rounds[1:]):
        holds(later.done.prompt.tokens > earlier.done.prompt.tokens, "the prompt grows")
        holds(later.done.prompt.reused_tokens > 0, "a continuation reuses tokens")


def held_rollout(stream):
    stream.create(f"rollout {STEPS}", hold=True)
    rounds, calls = [], []
    while not rounds or rounds[-1].status == pb.RESPONSE_STATUS_AWAITING_INPUT:
        rounds.append(stream.round())
        calls += rounds[-1].calls
        if rounds[-1].calls:
            equal(list(rounds[-1].done.call_ids), [rounds[-1].calls[0].call_id], "open calls")
            stream.append(rounds[-1].response_id, output(rounds[-1].calls[0]))
    check_rollout_of(rounds, calls)
    equal(rounds[-1].status, pb.RESPONSE_STATUS_COMPLETED, "status")
    equal(len({each.response_id for each in rounds}), 1, "one response")
    equal(rounds[-1].done.usage.samples, STEPS + 1, "samples")


def chained_rollout(stream):
    stream.create(f"rollout {STEPS}")
    rounds, calls = [stream.round()], []
    while rounds[-1].calls:
        last = rounds[-1]
        calls += last.calls
        equal(last.status, pb.RESPONSE_STATUS_COMPLETED, "status")
        stream.create(previous_response_id=last.response_id, input=[output(last.calls[0])])
        rounds.append(stream.round())
        equal(rounds[-1].created[0].previous_response_id, last.response_id, "parent")
        equal(rounds[-1].done.usage.samples, 1, "samples")
    check_rollout_of(rounds, calls)
    equal(len({each.response_id for each in rounds}), STEPS + 1, "a response a step")


def two_lanes(stream):
    rounds_of = {"left": 5, "right": 8}
    for lane, rounds in rounds_of.items():
        stream.create(f"rollout {rounds}", lane, hold=True)
    open_lanes = set(rounds_of)
    while open_lanes:
        for lane in sorted(open_lanes):
            last = stream.round(lane)
            if last.calls:
                stream.append(last.response_id, output(last.calls[0]))
            else:
                equal(last.text, f"finished {rounds_of[lane]} steps", lane)
                open_lanes.remove(lane)


def fork(stream):
    root = stream.answers("echo root")
    continued = {"previous_response_id": root.response_id}
    left = stream.answers("echo left", **continued)
    right = stream.answers("echo right", "other", **continued)
    deeper = stream.answers("echo deeper", "other", previous_response_id=left.response_id)
    equal([left.text, right.text, deeper.text], ["left", "right", "deeper"], "answers")
    equal(right.created[0].previous_response_id, root.response_id, "parent")
    for branch in (left, right, deeper):
        holds(branch.done.prompt.reused_tokens > 0, "a branch reuses what it shares")


def cancel(stream):
    stream.create("slow 5000")
    first = stream.until("output_text_delta")[-1]
    stream.send(cancel=pb.Cancel(response_id=first.response_id))
    end = stream.until("done")[-1]
    equal(end.done.status, pb.RESPONSE_STATUS_CANCELLED, "status")
    equal(end.response_id, first.response_id, "response")
    holds(end.done.usage.output_tokens > 0, "what was sampled is told")
    holds(end.done.usage.output_tokens < 5000, "it ended early")
    stream.create("echo lost", previous_response_id=first.response_id)
    refusal = stream.until("error")[-1].error
    equal(refusal.code, "previous_response_not_found", "nothing of it was committed")


def early_append(stream):
    stream.create("parallel 3", hold=True)
    calls, dispositions, ended, answer = [], [], [], ""
    while not ended or ended[-1].status == pb.RESPONSE_STATUS_AWAITING_INPUT:
        message = stream.next()
        event = message.WhichOneof("event")
        holds(event != "error", f"refused: {message.error}")
        if event == "output_item_done" and message.output_item_done.item.HasField("function_call"):
            call = message.output_item_done.item.function_call
            calls.append(call)
            # The model still samples, and no done has been seen.
            equal(ended, [], "ends before the outputs")
            stream.append(message.response_id, output(call))
        elif event == "appended":
            dispositions.append(message.appended.disposition)
        elif event == "done":
            ended.append(message.done)
        elif event == "output_item_done":
            answer = "".join(part.output_text.text for part in message.output_item_done.item.message.content)
    equal(len(calls), 3, "calls")
    equal(len(dispositions), 3, "accepted appends")
    holds(pb.DISPOSITION_UNSPECIFIED not in dispositions, "each append has a disposition")
    equal(answer, "collected: " + ",".join(f"out-{call.call_id}" for call in calls), "answer")


def outputs_in_any_order(stream):
    stream.create("parallel 3", hold=True)
    first = stream.round()
    equal(first.status, pb.RESPONSE_STATUS_AWAITING_INPUT, "status")
    equal(list(first.done.call_ids), [call.call_id for call in first.calls], "open calls")
    for call in reversed(first.calls):
        stream.append(first.response_id, output(call))
    equal(stream.round().status, pb.RESPONSE_STATUS_COMPLETED, "status")


def warm_up(stream):
    stream.create("echo warm", generate=False)
    ready = stream.round()
    equal(ready.status, pb.RESPONSE_STATUS_COMPLETED, "status")
    equal((ready.text, ready.done.usage.output_tokens), ("", 0), "nothing was sampled")
    equal(stream.answers(None, previous_response_id=ready.response_id).text, "warm", "answer")


def finish(stream):
    stream.create("rollout 3", hold=True)
    held = stream.round()
    stream.send(done=pb.Finish(response_id=held.response_id))
    ended = stream.round()
    equal(ended.response_id, held.response_id, "response")
    holds(ended.status != pb.RESPONSE_STATUS_AWAITING_INPUT, "it is no longer held")


def whole_items_only(stream):
    stream.create("echo quiet", deltas=False)
    kinds = [message.WhichOneof("event") for message in stream.until("done")]
    holds("output_item_done" in kinds, "the item came")
    holds("output_text_delta" not in kinds, "no delta came")


def steering(stream):
    stream.create("slow 100")
    first = stream.until("output_text_delta")
    stream.append(first[0].response_id, items.Item(user_text="echo steered"))
    appended, rest = None, []
    while not rest or rest[-1].WhichOneof("event") != "done":
        message = stream.next()
        if message.WhichOneof("event") == "appended":
            appended = message.appended
        rest.append(message)
    equal(appended.disposition, pb.DISPOSITION_QUEUED, "disposition")
    equal(len(appended.item_ids), 1, "ids of the message")
    answer = Round(first + rest)
    holds(answer.text.startswith("word0 "), "it had begun to answer")
    holds(answer.text.endswith("steered"), "then it heard the message")
    equal(answer.done.usage.samples, 2, "samples")


def reasoning(stream):
    answer = stream.answers("think tea")
    kinds = [message.output_item_done.item.WhichOneof("item") for message in answer.messages
             if message.WhichOneof("event") == "output_item_done"]
    equal(kinds, ["reasoning", "message"], "items")
    thought = "".join(m.reasoning_text_delta.delta for m in answer.messages)
    whole = next(m.output_item_done.item.reasoning.content for m in answer.messages
                 if m.output_item_done.item.HasField("reasoning"))
    equal(thought, whole, "deltas and finished reasoning")
    holds("tea" in whole, "it thought about it")
    equal(answer.text, "I thought about it: tea", "answer")
    holds(0 < answer.done.usage.reasoning_tokens < answer.done.usage.output_tokens, "reasoning tokens")


def reconnect(stream):
    other = Stream(stream.server, stream.model, stream.metadata)
    other.create("rollout 2")
    ended = other.round()
    other.create("rollout 2", "held", hold=True)
    other.round("held")
    other.cut()
    stream.create(previous_response_id=ended.response_id, input=[output(ended.calls[0])])
    second = stream.round()
    equal(numbers(second.calls), [1], "arguments")
    holds(second.done.prompt.extends_previous, "the state was kept")
    holds(second.done.prompt.encoded_tokens < second.done.prompt.reused_tokens, "little was encoded")


def prompt(stream):
    stream.create("rollout 2")
    root = stream.round()
    stream.create(previous_response_id=root.response_id, input=[output(root.calls[0], "the output")])
    answer = stream.round()

    def get(**request):
        return stream.stub.GetPrompt(pb.GetPromptRequest(
            response_id=answer.response_id, include_sampled=True, **request), metadata=stream.metadata)

    seen = get()
    equal(seen.fingerprint, answer.done.prompt.fingerprint, "fingerprint")
    equal(len(seen.token_ids), seen.total_tokens, "tokens")
    holds("rollout 2" in seen.text and "the output" in seen.text, "the text is whole")
    ends = [span.end_token for span in seen.spans]
    equal([span.first_token for span in seen.spans], [0] + ends[:-1], "spans without gaps")
    equal(ends[-1], seen.total_tokens, "spans to the end")
    sampled = [span for span in seen.spans if span.source == pb.SPAN_SOURCE_SAMPLED]
    equal([span.item_id for span in sampled],
          list(root.done.output_item_ids) + list(answer.done.output_item_ids), "sampled items")
    pages = [get(first_token=first, max_tokens=50) for first in range(0, seen.total_tokens, 50)]
    equal([token for page in pages for token in page.token_ids], list(seen.token_ids), "pages")


def kept_responses(stream):
    root = stream.answers("echo root", metadata={"ticket": "42"})
    last = stream.answers("echo last", previous_response_id=root.response_id)
    calls, metadata = stream.stub, stream.metadata
    kept = calls.GetResponse(pb.GetResponseRequest(response_id=root.response_id), metadata=metadata).response
    equal((kept.id, kept.status, dict(kept.metadata)),
          (root.response_id, pb.RESPONSE_STATUS_COMPLETED, {"ticket": "42"}), "response")
    equal(kept.usage, root.done.usage, "usage")
    page = calls.ListInputItems(pb.ListInputItemsRequest(
        response_id=last.response_id, page_size=1), metadata=metadata)
    rest = calls.ListInputItems(pb.ListInputItemsRequest(
        response_id=last.response_id, page_token=page.next_page_token), metadata=metadata)
    texts = [item.message.content[0].input_text for item in [*page.items, *rest.items]]
    equal(texts, ["echo root", "echo last"], "input items")
    calls.DeleteResponse(pb.DeleteResponseRequest(response_id=root.response_id), metadata=metadata)
    try:
        calls.GetResponse(pb.GetResponseRequest(response_id=root.response_id), metadata=metadata)
    except grpc.RpcError as error:
        equal(error.code(), grpc.StatusCode.NOT_FOUND, "code")
    else:
        raise AssertionError("it can still be got")


def without_a_stream(stream):
    create = pb.Create(input=[items.Item(user_text="echo alone")], model=stream.model)
    events = list(stream.stub.Create(
        pb.CreateRequest(request_id="one", create=create), metadata=stream.metadata))
    equal([event.sequence_number for event in events], list(range(1, len(events) + 1)), "sequence numbers")
    equal({event.request_id for event in events}, {"one"}, "request id")
    equal(Round(events).text, "alone", "answer")
    answer = stream.answers("echo on", previous_response_id=events[-1].response_id)
    equal(answer.text, "on", "answer of the continuation")


def listed_models(stream):
    calls = models_rpc.ModelsServiceStub(stream.channel)
    listed = calls.ListModels(models.ListModelsRequest(), metadata=stream.metadata).models
    equal([model.is_default for model in listed].count(True), 1, "default models")
    for model in listed:
        got = calls.GetModel(models.GetModelRequest(name=model.name), metadata=stream.metadata)
        equal(got.model, model, model.name)


def refused(stream, request_id, code, retry, names=""):
    """The command is refused in-band as told, and the stream is as usable as before."""
    message = stream.until("error")[-1]
    equal(message.request_id, request_id, "request id")
    equal(message.error.code, code, "code")
    equal(pb.Retry.Name(message.error.retry), pb.Retry.Name(retry), "retry")
    holds(message.error.message, "the error says something")
    holds(names in message.error.message + message.error.param, f"the error names {names}")
    equal(stream.answers("echo still here").text, "still here", "the stream goes on")


def unknown_previous_response(stream):
    sent = stream.create("echo x", previous_response_id="resp_unknown")
    refused(stream, sent, "previous_response_not_found", pb.RETRY_RESEND_FULL)


def unknown_model(stream):
    sent = stream.create("echo x", model="no-such-model")
    refused(stream, sent, "model_not_found", pb.RETRY_NEVER)


def bad_lane_name(stream):
    sent = stream.create("echo x", lane="not a lane")
    # Whether a name that is none is repeated in the error is left open.
    stream.waiting[""].append(stream.receive())
    refused(stream, sent, "invalid_lane", pb.RETRY_NEVER)


def output_of_unknown_call(stream):
    root = stream.answers("echo root")
    unknown = items.Item(function_call_output=items.FunctionCallOutput(call_id="call_unknown"))
    sent = stream.create(previous_response_id=root.response_id, input=[unknown])
    refused(stream, sent, "no_such_call", pb.RETRY_NEVER, names="call_unknown")


def missing_output(stream):
    stream.create("rollout 1")
    root = stream.round()
    sent = stream.create("echo x", previous_response_id=root.response_id)
    refused(stream, sent, "missing_tool_output", pb.RETRY_NEVER, names=root.calls[0].call_id)
    # The parent is as it was, so the right continuation still works.
    stream.create(previous_response_id=root.response_id, input=[output(root.calls[0])])
    equal(stream.round().text, "finished 1 steps", "answer")


def temperature_out_of_range(stream):
    sent = stream.create("echo x", temperature=3)
    refused(stream, sent, "invalid_request", pb.RETRY_NEVER, names="temperature")


def empty_command(stream):
    refused(stream, stream.send(), "invalid_request", pb.RETRY_NEVER)


def append_to_what_is_not_open(stream):
    over = stream.answers("echo over")
    sent = stream.append(over.response_id, items.Item(user_text="more"))
    refused(stream, sent, "response_not_open", pb.RETRY_NEVER)


CHECKS = [
    held_rollout, chained_rollout, two_lanes, fork, cancel, early_append, outputs_in_any_order,
    warm_up, finish, whole_items_only, steering, reasoning, reconnect, prompt, kept_responses,
    without_a_stream, listed_models, unknown_previous_response, unknown_model, bad_lane_name,
    output_of_unknown_call, missing_output, temperature_out_of_range, empty_command,
    append_to_what_is_not_open,
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="only these, by name")
    parser.add_argument("--server", default="127.0.0.1:50051", metavar="HOST:PORT")
    parser.add_argument("--model", help="absent: the server's default model")
    args = parser.parse_args()
    unknown = set(args.checks) - {check.__name__ for check in CHECKS}
    if unknown:
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    key = os.environ.get("HOTLOOP_API_KEY")
    metadata = [("authorization", f"Bearer {key}")] if key else []
    failed = 0
    for check in CHECKS:
        if args.checks and check.__name__ not in args.checks:
            continue
        stream = Stream(args.server, args.model, metadata)
        try:
            check(stream)
            stream.close()
            print(f"ok      {check.__name__}", flush=True)
        except (AssertionError, StopIteration, LookupError, ValueError, grpc.RpcError):
            failed += 1
            print(f"FAILED  {check.__name__}", flush=True)
            traceback.print_exc(limit=3)
        finally:
            stream.cut()
    print(f"{failed} failed" if failed else "all as promised")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
