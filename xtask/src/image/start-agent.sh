#!/bin/busybox sh
# Starts the agent in the background; what it says goes to the console.
{ vtrace agent "$@" 2>&1 </dev/null; echo "ended with status $?"; } | while read -r line; do
    echo "agent: $line"
done >/dev/console 2>&1 &
