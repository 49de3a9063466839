#!/bin/sh
set -e
if [ "$1" = configure ]; then
    if command -v systemd-sysusers >/dev/null; then systemd-sysusers vtrace.conf; fi
    if command -v systemd-tmpfiles >/dev/null; then systemd-tmpfiles --create vtrace.conf || true; fi
    if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
fi
