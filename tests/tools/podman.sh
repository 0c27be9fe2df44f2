#!/bin/sh
# Debian's podman with this project's own settings, images and networks, so that tests neither see
# nor change the machine's. Installed as target/tools/bin/podman.
here=$(dirname "$(dirname "$(readlink -f "$0")")")/podman
export CONTAINERS_CONF="$here/containers.conf"
# Health checks need systemd, which a container or a CI machine may lack.
export DISABLE_HC_SYSTEMD=true
exec podman --root "$here/root" --runroot "$here/run" "$@"
