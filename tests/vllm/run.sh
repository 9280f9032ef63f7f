#!/usr/bin/env bash
# Tests against a real vLLM on the CPU, in both of its dialects: installs it where it is not there (minutes, about 7 GB in
# target/vllm), starts both servers, runs the tests that need them, and stops the servers.
#
#   tests/vllm/run.sh            HOTLOOP_TEST_RECORD=1 keeps what the engines answer in tests/engines/tapes
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/vllm/install.sh
# Before the engines need the processor.
cargo test --locked --test engines --no-run

logs=$(mktemp -d)
pids=()
stop() {
    # Each is the leader of a group of its own.
    for pid in "${pids[@]}"; do kill -9 -- "-$pid" 2>/dev/null || true; done
}
trap stop EXIT
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
start() { # NAME ARGUMENT…
    setsid tests/vllm/serve.sh "${@:2}" >"$logs/$1.log" 2>&1 &
    pids+=($!)
}
answers() { # NAME PORT PID
    for _ in $(seq 300); do
        if (exec 3<>"/dev/tcp/127.0.0.1/$2") 2>/dev/null; then return; fi
        if ! kill -0 "$3" 2>/dev/null; then break; fi
        sleep 1
    done
    tail -30 "$logs/$1.log" >&2
    echo "the engine with the dialect $1 did not start" >&2
    return 1
}
http=$(free_port) vllm=$(free_port) engine=$(free_port)
start vllm vllm models/tiny-agent "$http" "$vllm"
start engine engine models/tiny-agent "$engine"
answers vllm "$vllm" "${pids[0]}"
answers engine "$engine" "${pids[1]}"

export HOTLOOP_TEST_VLLM=127.0.0.1:$vllm HOTLOOP_TEST_ENGINE=127.0.0.1:$engine
cargo test --locked --test engines -- --ignored --nocapture vllm_as_it_answers_now
if [ -z "${HOTLOOP_TEST_RECORD:-}" ]; then
    # The last one, since it kills one of them.
    export HOTLOOP_TEST_VLLM_PID=${pids[0]} HOTLOOP_TEST_ENGINE_PID=${pids[1]}
    cargo test --locked --test engines -- --ignored --nocapture a_real_engine_is_killed
fi
