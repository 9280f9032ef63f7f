"""An agent loop on one hotloop stream: each command carries only what is new."""

import argparse
import json
import os
import queue

import grpc
from hotloop.v1 import items_pb2 as items
from hotloop.v1 import responses_pb2 as pb
from hotloop.v1 import responses_pb2_grpc as rpc

SCHEMA = '{"type":"object","properties":{"path":{"type":"string"}},"required":["path"]}'
READ_FILE = items.Tool(function=items.FunctionTool(
    name="read_file", description="Read a text file.", parameters=SCHEMA))


def read_file(arguments):
    """What goes wrong goes back to the model, so that it can do better."""
    try:
        with open(json.loads(arguments)["path"], encoding="utf-8") as file:
            return file.read(65536)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"error: {error}"


def run(stub, task, held, metadata=()):
    commands = queue.SimpleQueue()  # gRPC sends what is put here; None closes our side
    commands.put(pb.ConnectRequest(create=pb.Create(
        input=[items.Item(user_text=task)], tools=[READ_FILE], hold=held)))
    outputs = []
    for message in stub.Connect(iter(commands.get, None), metadata=metadata):
        event = message.WhichOneof("event")
        if event == "output_text_delta":
            print(message.output_text_delta.delta, end="", flush=True)
        elif event == "output_item_done" and message.output_item_done.item.HasField("function_call"):
            if message.output_item_done.item.status == items.ITEM_STATUS_INCOMPLETE:
                continue  # what began like a call and is none; it comes as text
            call = message.output_item_done.item.function_call  # whole: it can run now
            output = items.Item(function_call_output=items.FunctionCallOutput(
                call_id=call.call_id, output=read_file(call.arguments)))
            if held:  # the model may still be sampling; it goes on by itself after the last output
                commands.put(pb.ConnectRequest(append=pb.Append(
                    response_id=message.response_id, input=[output])))
            else:
                outputs.append(output)
        elif event == "done" and message.done.status != pb.RESPONSE_STATUS_AWAITING_INPUT:
            if not outputs or message.done.status != pb.RESPONSE_STATUS_COMPLETED:
                commands.put(None)
                print(f"\n{pb.ResponseStatus.Name(message.done.status)}, {message.done.usage.total_tokens} tokens")
                continue
            commands.put(pb.ConnectRequest(create=pb.Create(
                previous_response_id=message.response_id, input=outputs)))
            outputs = []
        elif event == "error":
            raise SystemExit(f"{message.error.code}: {message.error.message}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--server", default="127.0.0.1:50051")
    parser.add_argument("--chained", action="store_true", help="a response each step, in place of a held one")
    args = parser.parse_args()
    key = os.environ.get("HOTLOOP_API_KEY")
    with grpc.insecure_channel(args.server) as channel:
        run(rpc.ResponsesServiceStub(channel), args.task, not args.chained,
            [("authorization", f"Bearer {key}")] if key else ())
