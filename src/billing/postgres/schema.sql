-- The table that the exporter `postgres` writes to: docs/billing.md tells what is in it. The exporter runs this
-- whenever it connects. Where its role may not make tables, run it by hand, once, as a role that may.
DO $$
BEGIN
    -- Of several servers that start at once one makes it, and the others wait here and then find it.
    PERFORM pg_advisory_xact_lock(hashtextextended('hotloop_usage', 0));
    IF to_regclass('hotloop_usage_format') IS NULL THEN
        CREATE TABLE hotloop_usage_format (version integer NOT NULL);
        INSERT INTO hotloop_usage_format VALUES (1);
        CREATE TABLE hotloop_usage (
            id text PRIMARY KEY,
            node text NOT NULL,
            response text NOT NULL,
            tenant text NOT NULL,
            key text NOT NULL,
            session text NOT NULL,
            model_asked text NOT NULL,
            model_served text NOT NULL,
            backend text NOT NULL,
            input_tokens bigint NOT NULL,
            new_tokens bigint NOT NULL,
            reused_tokens bigint NOT NULL,
            cached_tokens bigint NOT NULL,
            output_tokens bigint NOT NULL,
            reasoning_tokens bigint NOT NULL,
            delivered_tokens bigint NOT NULL,
            samples bigint NOT NULL,
            hosted_calls bigint NOT NULL,
            calls bigint NOT NULL,
            sample_ms bigint NOT NULL,
            cost_nanos bigint NOT NULL,
            stream_ms bigint NOT NULL,
            -- `end` is a word of SQL's own.
            ended text NOT NULL,
            reason text NOT NULL,
            finish text NOT NULL,
            price_book_version text NOT NULL,
            reserved_at timestamptz NOT NULL,
            settled_at timestamptz NOT NULL
        );
        CREATE INDEX hotloop_usage_tenant ON hotloop_usage (tenant, settled_at);
        CREATE INDEX hotloop_usage_settled ON hotloop_usage (settled_at);
        CREATE INDEX hotloop_usage_session ON hotloop_usage (session);
    END IF;
END
$$
