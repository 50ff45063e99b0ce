"""What a bug-report flow imports to read a vitalsd sidecar."""
