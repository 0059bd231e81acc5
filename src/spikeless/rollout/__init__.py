"""Which version callers get: promotion, rollback, status and pruning, on one server or a fleet."""
