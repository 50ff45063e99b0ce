# vitalsd answers on loopback only, so the container shares the host's network; and it reads the host's /proc:
#
#   docker build -t vitalsd .
#   docker run --rm --network host --pid host vitalsd serve --pid 4242
#
# With the host's pid namespace, /proc in the container is the host's. Processes of other users need --user.
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY clients clients
COPY launchd launchd
COPY systemd systemd
RUN python -m venv /opt/vitalsd && /opt/vitalsd/bin/pip install --no-cache-dir -c constraints.txt .

FROM ${BASE_IMAGE}
COPY --from=build /opt/vitalsd /opt/vitalsd
# A number, so that a runtime can see that it is not root.
USER 65532:65532
ENV PATH=/opt/vitalsd/bin:$PATH PYTHONDONTWRITEBYTECODE=1 VITALSD_STATE_DIR=/tmp/vitalsd
ENTRYPOINT ["vitalsd"]
CMD ["serve"]
