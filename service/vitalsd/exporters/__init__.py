"""The counters of a target for Prometheus and OpenTelemetry."""
