"""Export the counters of a target to Prometheus and OpenTelemetry."""
