#!/usr/bin/env bash
# The time to the first token by the step of a rollout, over hotloop and statelessly, through a real vLLM on the CPU: installs it where it
# is not there, serves a small model of random weights with a long context, and runs `cargo bench --bench engine`.
#
#   tests/vllm/ttft.sh [OPTION…]           options of the benchmark, such as --steps 30 --new-tokens 900
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/vllm/install.sh
model=target/ttft-model
cargo bench --locked --bench engine -- --write-model "$model"

log=$(mktemp)
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
http=$(free_port) grpc=$(free_port)
setsid tests/vllm/serve.sh vllm "$model" "$http" "$grpc" >"$log" 2>&1 &
pid=$!
trap 'kill -9 -- "-$pid" 2>/dev/null || true' EXIT
for _ in $(seq 300); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$grpc") 2>/dev/null; then break; fi
    if ! kill -0 "$pid" 2>/dev/null; then tail -30 "$log" >&2 && exit 1; fi
    sleep 1
done
cargo bench --locked --bench engine -- --model "$model" --grpc "127.0.0.1:$grpc" --http "127.0.0.1:$http" "$@"
