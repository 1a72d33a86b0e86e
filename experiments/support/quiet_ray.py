"""What keeps Ray's own words off the terminal; read by Ray when it is imported."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to Ray's makers
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # of its daemons; what becomes of a process we say ourselves
}
