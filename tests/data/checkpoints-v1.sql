-- The schema of version 1, as its agents made it.
CREATE TABLE meta (
    key TEXT PRIMARY KEY, value TEXT NOT NULL CHECK (typeof(value) = 'text'),
    CHECK (key <> 'start_unix_nano' OR (value NOT GLOB '*[^0-9]*' AND length(value) BETWEEN 1 AND 19))
) WITHOUT ROWID;
CREATE TABLE jobs (
    key INTEGER PRIMARY KEY,
    identity TEXT NOT NULL,
    job_id TEXT NOT NULL,
    name TEXT NOT NULL CHECK (typeof(name) = 'text'),
    backfill INTEGER NOT NULL,
    cursor BLOB CHECK (typeof(cursor) IN ('blob', 'null')),
    facts TEXT NOT NULL CHECK (typeof(facts) = 'text'),
    logs_complete INTEGER NOT NULL DEFAULT 0,
    ended INTEGER NOT NULL DEFAULT 0,
    updated_s REAL NOT NULL CHECK (typeof(updated_s) = 'real'),
    UNIQUE (identity, job_id),
    CHECK (typeof(identity) = 'text' AND typeof(job_id) = 'text')
);
CREATE TABLE seconds (
    job INTEGER NOT NULL, second INTEGER NOT NULL, lines INTEGER NOT NULL, uid_sum TEXT NOT NULL,
    PRIMARY KEY (job, second),
    CHECK (typeof(second) = 'integer' AND typeof(lines) = 'integer' AND lines BETWEEN 0 AND 1 << 53),
    CHECK (typeof(uid_sum) = 'text' AND uid_sum NOT GLOB '*[^0-9]*' AND length(uid_sum) BETWEEN 1 AND 20)
) WITHOUT ROWID;
CREATE TABLE spans (
    job INTEGER NOT NULL, span_id TEXT NOT NULL, resource BLOB NOT NULL, span BLOB NOT NULL,
    acked INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job, span_id),
    CHECK (typeof(span_id) = 'text' AND typeof(resource) = 'blob' AND typeof(span) = 'blob')
) WITHOUT ROWID;
CREATE INDEX unsent_spans ON spans (job) WHERE acked = 0;
CREATE TABLE runs (
    pipeline TEXT NOT NULL, result TEXT NOT NULL, error_type TEXT NOT NULL,
    sum_s REAL NOT NULL, buckets TEXT NOT NULL, exemplars TEXT NOT NULL,
    PRIMARY KEY (pipeline, result, error_type),
    CHECK (typeof(pipeline) = 'text' AND typeof(result) = 'text' AND typeof(error_type) = 'text')
) WITHOUT ROWID;
CREATE TABLE names (
    identity TEXT NOT NULL, job_id TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY (identity, job_id),
    CHECK (typeof(identity) = 'text' AND typeof(job_id) = 'text' AND typeof(name) = 'text')
) WITHOUT ROWID;
PRAGMA user_version = 1;
