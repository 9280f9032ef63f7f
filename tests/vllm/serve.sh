#!/usr/bin/env bash
# Serves a model directory with the vLLM that install.sh has put into target/vllm, on the CPU:
#
#   tests/vllm/serve.sh vllm   MODEL HTTP_PORT GRPC_PORT     the first-party gRPC server beside the HTTP one
#   tests/vllm/serve.sh engine MODEL GRPC_PORT               vllm.grpc.engine alone
set -euo pipefail
cd "$(dirname "$0")/../.."
vllm=${HOTLOOP_VLLM:-target/vllm}/bin/vllm
dialect=$1 model=$2
shift 2

# More than one OpenMP thread on a busy machine of two cores is ten times slower, and warming up many
# shapes takes minutes there.
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 \
    SMG_VLLM_SERVICER_WARMUP=0 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
options=(--enforce-eager --dtype float32 --max-num-seqs 8 --host 127.0.0.1
    --structured-outputs-config.backend guidance)
case $dialect in
vllm) VLLM_USE_RUST_FRONTEND=1 exec "$vllm" serve "$model" "${options[@]}" --port "$1" --grpc-port "$2" ;;
engine) exec "$vllm" serve "$model" "${options[@]}" --grpc --port "$1" ;;
*) echo "no such dialect: $dialect" >&2 && exit 2 ;;
esac
