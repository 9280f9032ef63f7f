#!/usr/bin/env bash
# The test against a real Apache Kafka, which it installs into target/kafka (54 MB): a broker in KRaft mode that is open on
# one port, and asks for a user over TLS on another. Needs java 17, mvn and openssl.
#
#   tests/kafka/run.sh
#
# Ends with 77 where it cannot be installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
# Before the broker needs the processor, and before only one certificate is trusted.
cargo test --locked --test billing --no-run

home=$PWD/target/kafka
mkdir -p "$home"
# Copied last, so that an installation that was broken off is begun anew.
if ! cmp -s tests/kafka/pom.xml "$home/pom.xml"; then
    rm -rf "$home/lib"
    mvn -q -B -f tests/kafka/pom.xml dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$home/lib" || exit 77
    cp tests/kafka/pom.xml "$home/pom.xml"
fi

run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
issue() { # NAME ARGUMENT…: a key and a certificate
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=$1" -keyout "$run/$1.key" -out "$run/$1.pem" "${@:2}" 2>/dev/null
}
issue authority
issue broker -CA "$run/authority.pem" -CAkey "$run/authority.key" \
    -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE
cat "$run/broker.key" "$run/broker.pem" >"$run/keys.pem"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
open=127.0.0.1:$(free_port) closed=127.0.0.1:$(free_port) controller=127.0.0.1:$(free_port)
cat >"$run/server.properties" <<PROPERTIES
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@$controller
listeners=OPEN://$open,CLOSED://$closed,CONTROLLER://$controller
listener.security.protocol.map=OPEN:PLAINTEXT,CLOSED:SASL_SSL,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=OPEN
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.closed.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
ssl.keystore.type=PEM
ssl.keystore.location=$run/keys.pem
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
log.dirs=$run/log
PROPERTIES
password=$(openssl rand -hex 16)
tests/kafka/kafka.sh kafka.tools.StorageTool format --config "$run/server.properties" --cluster-id hotloop-test-cluster01 \
    --add-scram "SCRAM-SHA-512=[name=hotloop,password=$password]" >/dev/null

export HOTLOOP_TEST_KAFKA_HOME=$run HOTLOOP_TEST_KAFKA_OPEN=$open HOTLOOP_TEST_KAFKA_CLOSED=$closed
export HOTLOOP_TEST_KAFKA_PASSWORD=$password SSL_CERT_FILE=$run/authority.pem
if ! cargo test --locked --test billing -- --ignored --nocapture a_real_kafka; then
    tail -30 "$run/server.log" >&2
    exit 1
fi
