"""The way of a call: check, replay or the registered op, and the choice of a backend. Above core and backends."""
