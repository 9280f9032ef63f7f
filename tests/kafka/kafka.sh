#!/usr/bin/env bash
# Runs a class of Apache Kafka, as tests/kafka/run.sh installed it.
#
#   tests/kafka/kafka.sh CLASS ARGUMENT…
set -euo pipefail
cd "$(dirname "$0")/../.."
# A heap that is small, and a start that is fast: nothing here runs for long.
exec java -Xmx512m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 \
    -Dorg.slf4j.simpleLogger.defaultLogLevel=warn -cp 'target/kafka/lib/*' "$@"
