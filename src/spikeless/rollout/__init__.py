"""Which version callers get: promotion, rollback, status and pruning."""
