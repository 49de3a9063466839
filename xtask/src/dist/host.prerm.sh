#!/bin/sh
set -e
# An upgrade leaves a server alone: devices of running guests do not outlive it.
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --now vtrace-server.socket vtrace-server.service
fi
