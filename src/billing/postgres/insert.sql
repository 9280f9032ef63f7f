-- $1: the records as a JSON array, with the keys that every exporter writes. $2: the node.
-- One statement is one transaction: no network that fails can leave one open, in the way of the next attempt.
INSERT INTO hotloop_usage (
    id, node, response, tenant, key, session, model_asked, model_served, backend,
    input_tokens, new_tokens, reused_tokens, cached_tokens, output_tokens, reasoning_tokens, delivered_tokens,
    samples, hosted_calls, calls, sample_ms, cost_nanos, stream_ms, ended, reason, finish, price_book_version, reserved_at, settled_at
)
SELECT
    id, $2, response, tenant, key, session, model_asked, model_served, backend,
    input_tokens, new_tokens, reused_tokens, cached_tokens, output_tokens, reasoning_tokens, delivered_tokens,
    samples, hosted_calls, calls, sample_ms, cost_nanos, stream_ms, "end", reason, finish, price_book_version,
    timestamptz 'epoch' + reserved_at_ms * interval '1 millisecond',
    timestamptz 'epoch' + settled_at_ms * interval '1 millisecond'
FROM json_to_recordset($1::json) AS record (
    id text, response text, tenant text, key text, session text, model_asked text, model_served text, backend text,
    input_tokens bigint, new_tokens bigint, reused_tokens bigint, cached_tokens bigint, output_tokens bigint,
    reasoning_tokens bigint, delivered_tokens bigint, samples bigint, hosted_calls bigint,
    calls bigint, sample_ms bigint, cost_nanos bigint, stream_ms bigint,
    "end" text, reason text, finish text, price_book_version text, reserved_at_ms bigint, settled_at_ms bigint
)
-- What comes twice is one record.
ON CONFLICT (id) DO NOTHING
