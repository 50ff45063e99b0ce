# vitalsd listens on loopback only, so its container must share the network namespace of its clients and the pid
# namespace of its target. docs/operations.md, "Docker", has the commands for the host, for one other container, and for
# a mounted /proc. Reports and runs are lost with the container, unless a volume is mounted at /tmp/vitalsd.
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY clients clients
COPY launchd launchd
COPY systemd systemd
RUN python3 -m venv /opt/vitalsd && /opt/vitalsd/bin/pip install --no-cache-dir -c constraints.txt .

FROM ${BASE_IMAGE}
COPY --from=build /opt/vitalsd /opt/vitalsd
# A number, so that a container runtime can verify that it is not root.
USER 65532:65532
ENV PATH=/opt/vitalsd/bin:$PATH PYTHONDONTWRITEBYTECODE=1 \
    VITALSD_STATE_DIR=/tmp/vitalsd VITALSD_RUNTIME_DIR=/tmp/vitalsd/run
HEALTHCHECK --interval=30s --timeout=10s --start-period=5s CMD ["vitalsd", "endpoints", "--check"]
ENTRYPOINT ["vitalsd"]
CMD ["serve"]
